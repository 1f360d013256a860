"""The course of a run: every term that its ``log.jsonl`` holds, as a small drawing each."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from fastdiff.errors import UserError
from fastdiff.eval.report.svg import COLOURS, Scale, drawing, line, text

Curve = Sequence[tuple[int, float]]
WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 312, 28, 162
_SPANS = 120


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The terms of a run as (step, value), by step; ``path`` is its ``log.jsonl`` or its folder.

    A step that stands twice, since the run went back to a checkpoint, counts as it was last. Values that are not finite
    stay as they are. The seconds are left out, and so is the count of skipped updates when there were none.

    Raises:
        UserError: the file is missing or holds something else.
    """
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the log {path}: {error}. Give the folder of a run, or its log.jsonl.") from error
    curves: dict[str, dict[int, float]] = {}
    for number, entry in enumerate(lines, 1):
        for name, (step, value) in _terms(path, number, entry).items():
            curves.setdefault(name, {})[step] = value
    if not any(curves.get("skipped", {}).values()):
        curves.pop("skipped", None)
    return {name: sorted(values.items()) for name, values in curves.items()}


def curve_svg(curve: Curve, *, label: str) -> str:
    """One term over the steps: the mean of each of at most 120 equal spans of steps, on a band from their least to largest.

    The axis is logarithmic for positive values that span more than a factor of 100. Values that are not finite are gaps.
    """
    runs = [list(run) for known, run in groupby(curve, key=lambda point: math.isfinite(point[1])) if known]
    across, up = _scales([step for step, _ in curve], [value for run in runs for _, value in run])
    span = max((across.high + 1 - across.low) / _SPANS, 1.0)  # the last step belongs to the last span
    parts = [line(f"M{LEFT} {up(v):.1f}H{RIGHT}", "rule") for v in up.ticks()]
    parts += [text(LEFT - 5, up(v) + 4, f"{v:.3g}", kind="muted", anchor="end") for v in up.ticks()]
    parts += [text(across(v), BOTTOM + 16, f"{v:g}", kind="muted", anchor="middle") for v in across.ticks()]
    parts += [line(f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", "ink"), text(4, 15, label + (" (log)" if up.log else ""))]
    for run in runs:
        spans = [list(part) for _, part in groupby(run, key=lambda point: int((point[0] - across.low) / span))]
        parts += _stroke([_Span.of(part) for part in spans], across, up)
    return drawing(WIDTH, HEIGHT, parts, label=f"{label} over the steps of training")


@dataclass(frozen=True)
class _Span:
    step: float
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Curve) -> "_Span":
        values = [value for _, value in points]
        return cls(fmean(step for step, _ in points), fmean(values), min(values), max(values))


def _stroke(spans: Sequence[_Span], across: Scale, up: Scale) -> list[str]:
    corners = [(s.step, s.high) for s in spans] + [(s.step, s.low) for s in reversed(spans)]
    band = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in corners)
    mean = "L".join(f"{across(s.step):.1f} {up(s.mean):.1f}" for s in spans)
    return [
        f'<polygon points="{band}" class="band" fill="{COLOURS["teacher"]}" fill-opacity=".2"/>',
        line(f"M{mean}h0", "teacher", width=1.5),
    ]


def _scales(steps: Sequence[int], values: Sequence[float]) -> tuple[Scale, Scale]:
    first, last = min(steps, default=0), max(steps, default=1)
    low, high = min(values, default=0.0), max(values, default=1.0)
    log = low > 0 and high > 100 * low
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low / 1.2, high * 1.2) if log else (low - margin, high + margin)
    return Scale(first, last if last > first else first + 1, LEFT, RIGHT), Scale(low, high, BOTTOM, TOP, log=log)


def _terms(path: Path, number: int, entry: str) -> dict[str, tuple[int, float]]:
    """The terms of one line, each with the step."""
    try:
        row = json.loads(entry)
        step = int(row["step"])
        return {name: (step, float(value)) for name, value in row.items() if name not in ("step", "seconds")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"line {number} of {path} is no line of a run's log ({error!r}): expected a JSON object with a step and numbers."
        ) from error
