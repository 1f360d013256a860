"""What a reader gets of results: a table for the terminal, a picture, JSON for programs and one self-contained page."""

from fastdiff.eval.report.columns import COLUMNS, cells, shown_columns, table
from fastdiff.eval.report.compare import Change, changes
from fastdiff.eval.report.curves import curve_svg, read_curves
from fastdiff.eval.report.machine import environment
from fastdiff.eval.report.page import html_report
from fastdiff.eval.report.pareto import pareto_frontier, pareto_svg
from fastdiff.eval.report.pictures import eight_bit, grid, grid_png
from fastdiff.eval.report.rows import joined_facts, read_facts, read_rows, rows_json, rows_jsonl
from fastdiff.eval.report.surface import surface_png, surface_svg

__all__ = [
    "COLUMNS",
    "Change",
    "cells",
    "changes",
    "curve_svg",
    "eight_bit",
    "environment",
    "grid",
    "grid_png",
    "html_report",
    "joined_facts",
    "pareto_frontier",
    "pareto_svg",
    "read_curves",
    "read_facts",
    "read_rows",
    "rows_json",
    "rows_jsonl",
    "shown_columns",
    "surface_png",
    "surface_svg",
    "table",
]
