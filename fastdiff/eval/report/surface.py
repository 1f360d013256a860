"""A teacher's Frechet distance over steps and guidance as a heat map, with the students under it at their own steps.

What a student has to beat is not the teacher at one setting but its best at each number of steps. All cells share one colour
scale, logarithmic when all values are positive, and one axis of steps, so that a student compares with the cells above it.
The teacher's best cell and the best student's are outlined.

>>> surface_svg([{"steps": 8, "guidance_scale": 3.0, "fd": 1.2}, ...], students=[{"model": "student", "steps": 1, "fd": 0.7}])
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastdiff.errors import UserError
from fastdiff.eval.report.columns import Row, finite, number
from fastdiff.eval.report.svg import CHARACTER, COLOURS, Scale, clipped, drawing, text
from fastdiff.files import aside

_CELL, _ROW, _TOP, _BAR, _LONGEST = 62, 34, 46, 12, 34  # pixels; the last in characters
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis: dark is low


@dataclass(frozen=True)
class Cell:
    """A coloured rectangle with a text in it; ``best`` is outlined."""

    x: float
    y: float
    width: float
    height: float
    colour: tuple[int, int, int]
    text: str = ""
    best: bool = False

    @property
    def ink(self) -> str:
        """Black or white, whichever stands out."""
        r, g, b = self.colour
        return "#000" if 0.299 * r + 0.587 * g + 0.114 * b > 140 else "#fff"


@dataclass(frozen=True)
class Label:
    """A text with the middle of its line at y."""

    x: float
    y: float
    text: str
    anchor: str = "start"


def surface_svg(rows: Sequence[Row], students: Sequence[Row] = ()) -> str:
    """The figure as SVG.

    Args:
        rows: the teacher's, each with ``steps``, ``guidance_scale`` and ``fd`` (None where it was not measured).
        students: each with ``model``, ``steps`` and ``fd``; those of one model share a line.

    Raises:
        UserError: a row lacks steps or guidance, two are of one cell, or no row has a distance.
    """
    width, height, cells, labels = _layout(rows, students)
    parts = [text(label.x, label.y + 4, label.text, anchor=label.anchor) for label in labels]
    for c in cells:
        edge = f' class="best" stroke="{COLOURS["student"]}" stroke-width="3"' if c.best else ""
        size = f'x="{c.x + 1:.1f}" y="{c.y + 1:.1f}" width="{c.width - 2:.1f}" height="{c.height - 2:.1f}"'
        parts.append(f'<rect {size} fill="#{bytes(c.colour).hex()}"{edge}/>')
        if c.text:
            x, y = c.x + c.width / 2, c.y + c.height / 2 + 4
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{c.ink}" text-anchor="middle">{html.escape(c.text)}</text>')
    return drawing(width, height, parts, label="Frechet distance over steps and guidance")


def surface_png(path: str | Path, rows: Sequence[Row], students: Sequence[Row] = (), *, scale: int = 2) -> None:
    """The figure of ``surface_svg`` as a PNG of ``scale`` times its size."""
    width, height, cells, labels = _layout(rows, students)
    sheet = Image.new("RGB", (math.ceil(width * scale), math.ceil(height * scale)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12 * scale)
    for c in cells:
        box = [scale * v for v in (c.x + 1, c.y + 1, c.x + c.width - 1, c.y + c.height - 1)]
        draw.rectangle(box, fill=c.colour, outline=COLOURS["student"] if c.best else None, width=3 * scale)
        draw.text((scale * (c.x + c.width / 2), scale * (c.y + c.height / 2)), c.text, fill=c.ink, font=font, anchor="mm")
    for label in labels:
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[label.anchor]
        draw.text((scale * label.x, scale * label.y), label.text, fill=COLOURS["ink"], font=font, anchor=anchor)
    with aside(path) as part:
        sheet.save(part, format="PNG")


Lines = dict[str, dict[int, float | None]]  # the distances of a line of cells by steps


def _layout(rows: Sequence[Row], students: Sequence[Row]) -> tuple[float, float, list[Cell], list[Label]]:
    """Width, height, cells and labels in pixels."""
    ordered = sorted(rows, key=lambda row: finite(row.get("guidance_scale")) or 0.0)
    blocks = [_lines(ordered, "guidance_scale", "guidance "), _lines(students, "model", "")]
    steps = sorted({k for lines in blocks for line in lines.values() for k in line})
    values = [v for lines in blocks for v in _known(lines)]
    if not values:
        raise UserError("no row of the sweep has a distance `fd`: there is nothing to draw.")
    ramp = Scale(min(values), max(values) if max(values) > min(values) else min(values) + 1.0, 0.0, 1.0, log=min(values) > 0)
    left = 24 + CHARACTER * max(len(clipped(name, _LONGEST)) for lines in blocks for name in lines)
    labels = [Label(left + _CELL * len(steps) / 2, 14, "steps", "middle")]
    labels += [Label(left + _CELL * (j + 0.5), 34, str(k), "middle") for j, k in enumerate(steps)]
    cells, y = list[Cell](), float(_TOP)
    for lines in filter(None, blocks):
        for name, line in lines.items():
            labels.append(Label(left - 10, y + _ROW / 2, clipped(name, _LONGEST), "end"))
            cells += _row(line, steps, left, y, ramp, min(_known(lines), default=None))
            y += _ROW
        y += 12
    cells += [Cell(left + 5 * i - 1, y, 7, _BAR, _colour(i / 23)) for i in range(24)]
    labels.append(Label(left - 10, y + _BAR / 2, f"FD {ramp.low:.3g}", "end"))
    labels.append(Label(left + 130, y + _BAR / 2, f"{ramp.high:.3g}{' (log)' if ramp.log else ''}"))
    return left + _CELL * max(len(steps), 4) + 10, y + _BAR + 8, cells, labels


def _row(line: dict[int, float | None], steps: list[int], left: float, y: float, ramp: Scale, best: float | None) -> list[Cell]:
    known = [(j, line[k]) for j, k in enumerate(steps) if k in line]
    empty = (127, 127, 127)
    return [
        Cell(left + _CELL * j, y, _CELL, _ROW, empty, "-")
        if v is None
        else Cell(left + _CELL * j, y, _CELL, _ROW, _colour(ramp(v)), f"{v:.3g}", v == best)
        for j, v in known
    ]


def _lines(rows: Sequence[Row], key: str, prefix: str) -> Lines:
    lines: Lines = {}
    for row in rows:
        steps, name = row.get("steps"), row.get(key)
        if not isinstance(steps, int) or name is None:
            raise UserError(f"the sweep's row {dict(row)} needs whole `steps` and a `{key}`: its cell has no place otherwise.")
        line = lines.setdefault(f"{prefix}{number(name)}", {})
        if steps in line:
            raise UserError(f"the sweep has two rows of {key} {name} at {steps} steps: one would hide the other.")
        line[steps] = finite(row.get("fd"))
    return lines


def _known(lines: Lines) -> list[float]:
    return [v for line in lines.values() for v in line.values() if v is not None]


def _colour(share: float) -> tuple[int, int, int]:
    """The ramp at ``share`` in [0, 1], linear between its colours."""
    place = share * (len(_RAMP) - 1)
    i = min(int(place), len(_RAMP) - 2)
    r, g, b = (round(a + (place - i) * (z - a)) for a, z in zip(_RAMP[i], _RAMP[i + 1], strict=True))
    return r, g, b
