"""Quality against cost: the frontier, and the figure that few-step distillation is about.

A point dominates another when it is no worse in cost and in quality and better in one of them; the frontier is what nobody
dominates. Two equal points do not dominate each other, so both are on it. The frontier is one of measured values: members
within their errors may swap with points beside them.
"""

import html
from collections.abc import Sequence

from fastdiff.eval.report.columns import COLUMNS, Row, better, cells, finite, generated, number
from fastdiff.eval.report.labels import Box, Spot, place
from fastdiff.eval.report.svg import COLOURS, Scale, clipped, drawing, line, paint, text

WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 464, 30, 272  # the plotted rectangle, in pixels
INSIDE = Box(LEFT + 2, TOP - 8, WIDTH - 2, BOTTOM - 1)  # where names may stand
AXES = {
    "nfe": "network calls an image (NFE)",
    "latency_ms_p50": "latency of one image, ms (p50)",
    "parameters_m": "parameters of the denoiser, millions",
}


def pareto_frontier(points: Sequence[tuple[float | None, float | None]], *, higher_is_better: bool = False) -> list[int]:
    """The indices of the points (cost, quality) that no other dominates, by cost and then by index; O(n log n).

    Less cost is better; less quality too (a distance) unless ``higher_is_better``. A point with a value that is None or not
    finite is not on the frontier and dominates nobody.
    """
    sign = -1 if higher_is_better else 1
    pairs = [(finite(cost), finite(quality), i) for i, (cost, quality) in enumerate(points)]
    known = [(cost, sign * q, i) for cost, q, i in pairs if cost is not None and q is not None]
    frontier: list[tuple[float, float, int]] = []
    for cost, q, i in sorted(known):
        if not frontier or q < frontier[-1][1] or (cost, q) == frontier[-1][:2]:
            frontier.append((cost, q, i))
    return [i for _, _, i in frontier]


def frontier_of(rows: Sequence[Row], cost: str, quality: str) -> list[Row]:
    """The rows on the frontier of two columns, the cheapest first."""
    points = [(_cost(row, cost), finite(row.get(quality))) for row in rows]
    return [rows[i] for i in pareto_frontier(points, higher_is_better=better(quality) == "high")]


def pareto_svg(rows: Sequence[Row], *, cost: str = "nfe", quality: str = "fd", label: str = "") -> str:
    """Each row's ``quality`` over its ``cost`` with one standard error up and down, and the frontier as a staircase.

    Cost is in the logarithm. Quality starts at 0 where less is better, and is in the logarithm when it spans more than a
    factor of 5. Rows without any cost, such as real images, are a dashed line across, at the lower edge with an arrow when
    they lie below a logarithmic axis. Points of the frontier are full and always named; the others are hollow, and named
    where there is room. Rows without the two columns are left out. Less is better for a column of which nothing is known.

    Args:
        label: of the quality axis; by default the column's name.
    """
    rows = [r for r in rows if finite(r.get(quality)) is not None]
    points, floors = [r for r in rows if _cost(r, cost) is not None], [r for r in rows if not generated(r)]
    across = _across([r[cost] for r in points])
    floor = [r[quality] for r in floors]
    up = _up([(r[quality], finite(r.get(f"{quality}_se")) or 0.0) for r in points], floor, better(quality) == "high")
    label = (label or COLUMNS.get(quality, quality)) + (" (log)" if up.log else "")
    best = {id(r) for r in frontier_of(points, cost, quality)}
    points.sort(key=lambda r: (id(r) not in best, r[cost]))
    at = [(across(r[cost]), up(r[quality])) for r in points]
    parts = [*_axes(across, up, cost, label), line(_staircase(at[: len(best)]), "frontier", width=2)]
    parts += [line(f"M{LEFT} {_edge(up, v):.1f}H{RIGHT}", "muted", dashed=True) for v in floor]
    parts += [_point(r, x, up, cost, quality, full=id(r) in best) for r, (x, _) in zip(points, at, strict=True)]
    spots = [_floor_name(r["model"], v, up) for r, v in zip(floors, floor, strict=True)]
    parts += [text(spot.x, spot.y, spot.text, kind="muted", anchor=spot.anchor) for spot in spots]
    taken = [spot.box for spot in spots] + [Box(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    corners = [*at[: len(best)], (RIGHT, 0.0)]
    taken += [Box(x, y - 1, end, y + 1) for (x, y), (end, _) in zip(corners, corners[1:], strict=False)]
    for r, (x, y) in zip(points, at, strict=True):
        if found := place(r["model"], x, y, taken, INSIDE, must=id(r) in best):
            parts.append(text(found.x, found.y, found.text, kind=_kind(r), anchor=found.anchor))
            taken.append(found.box)
    return drawing(WIDTH, HEIGHT, parts, label=f"{label} against {AXES.get(cost, cost)}")


def _cost(row: Row, column: str) -> float | None:
    value = finite(row.get(column))
    return value if value is not None and value > 0 else None


def _across(costs: Sequence[float]) -> Scale:
    low, high = min(costs, default=1.0), max(costs, default=1.0)
    margin = max(1.25, (high / low) ** 0.06) if high > low else 1.6
    return Scale(low / margin, high * margin, LEFT, RIGHT, log=True)


def _up(values: Sequence[tuple[float, float]], floors: Sequence[float], higher: bool) -> Scale:
    """The scale of quality for points with their errors, and floors that it shows if it is linear."""
    measured = [v for v, _ in values]
    if not higher and measured and min(measured) > 0 and max(measured) > 5 * min(measured):
        least = min(v - e if v > 1.5 * e else v / 1.5 for v, e in values)
        return Scale(least / 1.3, 1.3 * max(v + e for v, e in values), BOTTOM, TOP, log=True)
    low = min([v - e for v, e in values] + list(floors), default=0.0)
    high = max([v + e for v, e in values] + list(floors), default=1.0)
    if not higher and low >= 0:
        return Scale(0.0, 1.1 * high or 1.0, BOTTOM, TOP)
    margin = 0.12 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, BOTTOM, TOP)


def _edge(up: Scale, value: float) -> float:
    """Where a floor is drawn: at its value, or at the edge of a logarithmic axis that it leaves."""
    return up(min(max(value, up.low), up.high))


def _floor_name(model: str, value: float, up: Scale) -> Spot:
    arrow = "↓ " if value < up.low else "↑ " if value > up.high else ""
    return Spot(RIGHT - 2, _edge(up, value) - 5, f"{arrow}{clipped(model, 44)}: {number(value)}", "end")


def _axes(across: Scale, up: Scale, cost: str, label: str) -> list[str]:
    parts = [line(f"M{LEFT} {up(v):.1f}H{RIGHT}", "rule") for v in up.ticks()]
    parts += [text(LEFT - 6, up(v) + 4, f"{v:g}", kind="muted", anchor="end") for v in up.ticks()]
    for v in across.ticks(octaves=cost == "nfe"):
        parts += [
            line(f"M{across(v):.1f} {BOTTOM}v4", "ink"),
            text(across(v), BOTTOM + 17, f"{v:g}", kind="muted", anchor="middle"),
        ]
    parts += [line(f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", "ink"), text(8, 16, label)]
    return [*parts, text((LEFT + RIGHT) / 2, HEIGHT - 10, AXES.get(cost, COLUMNS.get(cost, cost)), anchor="middle")]


def _staircase(points: Sequence[tuple[float, float]]) -> str:
    """From the cheapest member to the right edge; what lies on its better side was reached by nobody."""
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])
    return f"M{points[0][0]:.1f} {points[0][1]:.1f}{steps}H{RIGHT}" if points else "M0 0"


def _point(row: Row, x: float, up: Scale, cost: str, quality: str, *, full: bool) -> str:
    kind, value, error = _kind(row), row[quality], finite(row.get(f"{quality}_se"))
    bar = ""
    if error and not (up.log and value <= 1.5 * error):
        bar = line(f"M{x:.1f} {up(value - error):.1f}V{up(value + error):.1f}", kind, width=1.5)
    fill = paint(kind) if full else f'class="{kind}-line hollow" fill="#fff" stroke="{COLOURS[kind]}" stroke-width="1.5"'
    about = html.escape(", ".join([row["model"], *cells(row, [quality, cost])]))
    return f'{bar}<circle cx="{x:.1f}" cy="{up(value):.1f}" r="5" {fill}><title>{about}</title></circle>'


def _kind(row: Row) -> str:
    return "student" if row["model"].startswith("student") else "teacher"
