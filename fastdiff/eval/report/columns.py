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
    "latency_ms_p50": "ms (p50)",
    "latency_ms_p95": "ms (p95)",
    "images_per_s": "images/s",
    "peak_memory_mib": "peak MiB",
    "params": "params",
    "n": "n",
}
COSTS = ("steps", "nfe", "guidance_scale", "latency_ms_p50", "latency_ms_p95", "images_per_s", "peak_memory_mib", "params", "n")
HIDDEN = ("protocol",)
HIGHER = frozenset({"clip", "attributes", "inception_score", "precision", "recall", "density", "coverage", "images_per_s"})
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def higher_is_better(column: str) -> bool:
    """Whether more of a column is better: so for CLIP, attributes, Inception score, precision and recall; not for distances."""
    return column in HIGHER


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that some row fills: the known ones in their order, then a protocol's own."""
    keys = dict.fromkeys([*COLUMNS, *(k for row in rows for k in row if not k.endswith("_se"))])
    return [k for k in keys if k not in HIDDEN and any(row.get(k) is not None for row in rows)]


def score_columns(rows: Sequence[Row]) -> list[str]:
    """The shown columns that are scores."""
    return [c for c in shown_columns(rows) if c != "model" and c not in COSTS]


def generated(row: Row) -> bool:
    """Whether a model made the row's images: real ones have no cost."""
    return any(row.get(c) is not None for c in COSTS if c != "n")


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """A row as text: four digits, ``value ± error`` where the row has ``<column>_se``, - for what does not apply."""
    return [shown(row.get(c), c) + (f" {error}" if (error := plus_minus(row, c)) else "") for c in columns]


def shown(value: Any, column: str) -> str:
    """A value as text; parameters as 860M."""
    return short(value) if column == "params" and value is not None else number(value)


def plus_minus(row: Row, column: str) -> str:
    """``± error`` in two digits, or nothing where the row knows no error."""
    error = row.get(f"{column}_se")
    return "" if error is None or row.get(column) is None else f"± {error:.2g}"


def number(value: Any) -> str:
    """A value as text: floats to four digits, None as -."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(value: float) -> str:
    """Three digits and k, M or G: 859520964 is 860M."""
    for unit, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{prefix}"
    return f"{value:.3g}"


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


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text, one line a model."""
    columns = shown_columns(rows)
    lines = [[COLUMNS.get(c, c) for c in columns], *(cells(row, columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )
