"""The columns of a result: their order, their names, which are scores and which way is better; and a table for the terminal.

A row is what ``Result.row()`` gives and JSON holds: ``model``, costs, and scores, each with its standard error as
``<score>_se`` where one is known. Whatever is not a cost is a score.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdiff.errors import UserError

Row = Mapping[str, Any]

COLUMNS = {
    "model": "model",
    "steps": "steps",
    "nfe": "NFE",
    "guidance_scale": "guidance",
    "fd": "FD",
    "clip": "CLIP",
    "attributes": "attributes",
    "fd_mean": "FD mean term",
    "fd_cov": "FD cov. term",
    "fd_inf": "FD inf",
    "fd_patch": "patch FD",
    "kid": "KID",
    "sfd": "sFD",
    "inception_score": "IS",
    "inception_score_sd": "IS sd of splits",
    "cmmd": "CMMD",
    "copied": "copied",
    "copies": "exact copies",
    "mind": "MIND",
    "n_duplicates": "duplicates",
    "latency_ms_p50": "ms (p50)",
    "latency_ms_p95": "ms (p95)",
    "images_per_s": "images/s",
    "peak_memory_mib": "peak MiB",
    "energy_j": "J/image",
    "parameters_m": "M params",
    "pipeline_parameters_m": "M params (pipeline)",
    "size_mb": "MB on disk",
    "n": "n",
}
SETTINGS = ("model", "steps", "nfe", "guidance_scale")
LESS = frozenset(
    {"nfe", "fd", "fd_mean", "fd_cov", "fd_inf", "fd_patch", "sfd", "kid", "cmmd", "mind", "n_duplicates", "copied", "copies"}
    | {"latency_ms_p50", "latency_ms_p95", "peak_memory_mib", "energy_j", "parameters_m", "pipeline_parameters_m", "size_mb"}
)
MORE = frozenset(
    {"images_per_s", "clip", "attributes", "inception_score", "precision", "recall", "density", "coverage"}
    | {"pickscore", "hpsv2.0", "hpsv2.1", "imagereward", "aesthetic"}
)
_COSTS = (
    *("latency_ms_p50", "latency_ms_p95", "images_per_s", "peak_memory_mib", "energy_j"),
    *("parameters_m", "pipeline_parameters_m", "size_mb"),
)
_FINE = frozenset(
    {
        "guidance_scale",
        "fd_mean",
        "fd_cov",
        "fd_inf",
        "kid",
        "mind",
        "n_duplicates",
        "inception_score_sd",
        "copies",
        "density",
        "coverage",
        "n",
    }
    | {"latency_ms_p95", "peak_memory_mib", "parameters_m", "pipeline_parameters_m", "size_mb"}
)
_HIDDEN = ("protocol", "groups")


def better(column: str) -> str:
    """``low`` where less of a column is better, ``high`` where more is, nothing where that is not known."""
    return "low" if column in LESS else "high" if column in MORE else ""


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that some row fills: the known ones in their order, then a protocol's own."""
    keys = dict.fromkeys([*COLUMNS, *(k for row in rows for k in row if not k.endswith("_se"))])
    return [k for k in keys if k not in _HIDDEN and any(row.get(k) is not None for row in rows)]


def score_columns(rows: Sequence[Row]) -> list[str]:
    """The shown columns that are scores."""
    return [c for c in shown_columns(rows) if c not in (*SETTINGS, *_COSTS, "n")]


def cost_columns(rows: Sequence[Row]) -> list[str]:
    """The shown columns that are costs, beside the settings and NFE."""
    return [c for c in shown_columns(rows) if c in _COSTS]


def generated(row: Row) -> bool:
    """Whether the row knows what its images cost: real ones, and stored ones of unknown origin, do not."""
    return any(row.get(c) is not None for c in (*SETTINGS[1:], *_COSTS))


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row as text: four digits, ``value ± error`` where the row has ``<column>_se``, - for what does not apply."""
    return [f"{number(row.get(c))} {plus_minus(row, c)}".rstrip() for c in columns]


def plus_minus(row: Row, column: str) -> str:
    """``± error`` in two digits, or nothing where the row knows no error."""
    error = row.get(f"{column}_se")
    return "" if error is None or row.get(column) is None else f"± {error:.2g}"


def number(value: Any) -> str:
    """A value as text: floats to four digits, None as -."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finite(value: Any) -> float | None:
    """``value`` as a float; None for what is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def named(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows by their model; ``UserError`` when two have one name, as nobody could tell them apart."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["model"] in found:
            raise UserError(f"two rows are called {row['model']!r}: give each model a name of its own.")
        found[row["model"]] = row
    return found


def table(rows: Sequence[Row], *, brief: bool = False, names: Mapping[str, str] | None = None) -> str:
    """The rows as aligned plain text, one line a model.

    Args:
        brief: only the columns that most readers ask for, so that a line fits a terminal.
        names: of columns in place of ``COLUMNS``, such as ``{"fd": protocol.label("FD[fashion]")}``.
    """
    columns = [c for c in shown_columns(rows) if not (brief and c in _FINE)]
    heads = {**COLUMNS, **(names or {})}
    lines = [[heads.get(c, c) for c in columns], *(cells(row, columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )
