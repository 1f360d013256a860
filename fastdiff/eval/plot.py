"""Quality against network calls as an SVG drawing: the figure that few-step distillation is about."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 500, 15, 260  # the plotted rectangle, in pixels


@dataclass(frozen=True)
class Axes:
    """From network calls (in octaves) and a metric (from 0) to pixels."""

    octaves: float
    highest: float

    def x(self, calls: float) -> float:
        return LEFT + 15 + (RIGHT - LEFT - 30) * math.log2(max(calls, 1)) / self.octaves

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / self.highest


def plot_svg(rows: Sequence[Row], *, metric: str = "fd", label: str = "FD") -> str:
    """Each row's ``metric`` over its ``nfe``; a row without calls (real images) is a dashed line across.

    Rows without the metric are left out; students are red. The text is escaped and the drawing needs no script.
    """
    known = [r for r in rows if r.get(metric) is not None]
    points, floors = [r for r in known if r.get("nfe")], [r for r in known if not r.get("nfe")]
    highest = 1.15 * max([r[metric] for r in known], default=0.0) or 1.0
    axes = Axes(max([math.log2(r["nfe"]) for r in points if r["nfe"] > 1], default=1.0), highest)
    parts = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#222"/>', _text(8, TOP + 4, label)]
    parts += [_text(LEFT, HEIGHT - 6, "network calls an image (NFE)")]
    parts += [_text(axes.x(c), BOTTOM + 16, number(c), anchor="middle") for c in sorted({r["nfe"] for r in points})]
    parts += [_text(LEFT - 6, axes.y(v) + 4, number(v), anchor="end") for v in (0, highest / 2)]
    parts += [_floor(r["model"], axes.y(r[metric])) for r in floors]
    parts += [_point(r["model"], axes.x(r["nfe"]), axes.y(r[metric]), number(r[metric])) for r in points]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12">{"".join(parts)}</svg>'


def number(value: Any) -> str:
    """A value as text: floats to four digits, None as -."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _floor(name: str, y: float) -> str:
    line = f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#888" stroke-dasharray="5 4"/>'
    return line + _text(RIGHT + 5, y + 4, name, colour="#666")


def _point(name: str, x: float, y: float, value: str) -> str:
    colour, late = "#c33" if name.startswith("student") else "#36c", x > (LEFT + RIGHT) / 2
    label = _text(x - 9 if late else x + 9, y - 5, f"{name}: {value}", colour, anchor="end" if late else "start")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>' + label


def _text(x: float, y: float, text: str, colour: str = "#222", *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{html.escape(text)}</text>'
