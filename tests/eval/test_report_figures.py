import json
import math
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.eval.report import curve_svg, pareto_frontier, pareto_svg, read_curves, surface_png, surface_svg
from fastdiff.eval.report.labels import Box, place
from fastdiff.eval.report.svg import Scale

BEYOND = "<script>alert(1)</script>"


def drawn(svg: str, tag: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if element.tag.endswith(tag)]


def brute_force(points, higher):
    """What nobody dominates, by the definition."""
    known = {i: p for i, p in enumerate(points) if None not in p and all(map(math.isfinite, p))}
    at_least = (lambda a, b: a >= b) if higher else (lambda a, b: a <= b)
    dominated = {
        i for i, p in known.items() for q in known.values() if q[0] <= p[0] and at_least(q[1], p[1]) and tuple(q) != tuple(p)
    }
    return sorted(known.keys() - dominated, key=lambda i: (points[i][0], i))


@pytest.mark.parametrize("higher", [False, True])
def test_frontier_is_what_nobody_dominates(higher):
    values = [None, math.nan, math.inf, 0, 1, 2, 3, 4, 5]  # few, so that ties in one and in both are frequent
    for seed in range(300):
        draw = random.Random(seed)
        points = [(draw.choice(values), draw.choice(values)) for _ in range(draw.randrange(15))]
        assert pareto_frontier(points, higher_is_better=higher) == brute_force(points, higher)


def test_frontier_of_ties_and_of_nothing():
    assert pareto_frontier([(1, 2), (1, 2), (1, 3), (2, 2), (2, 1)]) == [0, 1, 4]
    assert pareto_frontier([(1, 2), (1, 3), (2, 3), (2, 4)], higher_is_better=True) == [1, 3]
    assert pareto_frontier([(None, 1.0), (1.0, None)]) == pareto_frontier([]) == []


ROWS = [{"model": f"teacher ({k})", "nfe": float(k), "fd": fd, "fd_se": 0.1} for k, fd in ((1, 4.0), (8, 2.0), (64, 1.0))]


def test_costs_are_in_octaves_and_a_distance_starts_at_zero():
    svg = pareto_svg([*ROWS, {"model": "real", "nfe": None, "fd": 0.5}, {"model": "no fd", "nfe": 2.0}])
    (x0, y0), (x1, y1), (x2, y2) = ((float(c.get("cx", 0)), float(c.get("cy", 0))) for c in drawn(svg, "circle"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(2 * (y2 - y1), abs=0.3)
    (dashed,) = [p for p in drawn(svg, "path") if p.get("stroke-dasharray")]
    floor = float(re.findall(r"M\d+ ([\d.]+)H", dashed.get("d", ""))[0])
    assert floor - y2 == pytest.approx((y2 - y1) / 2, abs=0.3)


def test_distances_that_span_much_are_in_the_logarithm_and_the_floor_stays_in_sight():
    rows = [{**row, "fd": fd} for row, fd in zip(ROWS, (16.0, 4.0, 1.0), strict=True)]
    svg = pareto_svg([*rows, {"model": "real", "fd": 0.001}])
    y = [float(c.get("cy", 0)) for c in drawn(svg, "circle")]
    assert sorted(y)[1] - min(y) == pytest.approx(max(y) - sorted(y)[1], abs=0.2)
    (dashed,) = [p for p in drawn(svg, "path") if p.get("stroke-dasharray")]
    assert max(y) < float(re.findall(r"M\d+ ([\d.]+)H", dashed.get("d", ""))[0]) <= 272
    assert {"↓ real: 0.001", "FD (log)"} <= {t.text for t in drawn(svg, "text")}


def test_frontier_is_a_staircase_through_its_members_which_are_full_and_named():
    rows = [*ROWS, {"model": "slow", "nfe": 64.0, "fd": 3.0}, {"model": "student", "nfe": 1.0, "fd": 3.0}]
    svg = pareto_svg(rows)
    titles = {c[0].text.split(",")[0]: c for c in drawn(svg, "circle")}
    full = {name for name, circle in titles.items() if "hollow" not in circle.get("class", "")}
    assert full == {"student", "teacher (8)", "teacher (64)"}
    assert full <= {t.text for t in drawn(svg, "text")}
    (path,) = [p.get("d", "") for p in drawn(svg, "path") if p.get("class") == "frontier-line"]
    corners = [f"{titles[name].get('cx')} {titles[name].get('cy')}" for name in ("student", "teacher (8)", "teacher (64)")]
    assert path.startswith(f"M{corners[0]}H")
    assert path.replace("H", " ").replace("V", " ").endswith(f"{corners[1]} {corners[2]} 464")


def test_more_is_better_for_scores_of_images():
    rows = [{"model": n, "nfe": c, "clip": v} for n, c, v in (("a", 1.0, 30.0), ("b", 2.0, 29.0), ("c", 4.0, 31.0))]
    circles = drawn(pareto_svg(rows, quality="clip"), "circle")
    assert {c[0].text.split(",")[0] for c in circles if "hollow" not in c.get("class", "")} == {"a", "c"}


def test_drawings_of_one_row_and_of_none_and_hostile_names():
    assert len(drawn(pareto_svg([{"model": BEYOND, "nfe": 1.0, "fd": 0.0}], label=BEYOND), "circle")) == 1
    assert not drawn(pareto_svg([]), "circle")
    for svg in (
        pareto_svg([{"model": BEYOND, "nfe": 1.0, "fd": 0.0}, {"model": BEYOND, "fd": 1.0}], label=BEYOND),
        curve_svg([(1, 2.0)], label=BEYOND),
        surface_svg([{"steps": 1, "guidance_scale": 1.0, "fd": 2.0}], [{"model": BEYOND, "steps": 1, "fd": 1.0}]),
    ):
        assert not drawn(svg, "script")


def test_names_avoid_what_is_taken():
    inside, point = Box(0, 0, 400, 400), Box(194, 194, 206, 206)
    right = place("name", 200, 200, [point], inside)
    assert (right.anchor, right.x) == ("start", 209)
    left = place("name", 200, 200, [point, right.box], inside)
    assert left.anchor == "end"
    everywhere = [Box(100, 100, 300, 300)]
    assert place("name", 200, 200, everywhere, inside) is None
    assert place("name", 200, 200, everywhere, inside, must=True) is not None
    assert place("name", 395, 200, [], inside).anchor == "end"


@pytest.mark.parametrize("scale", [Scale(0.3, 7.1, 0, 1), Scale(-2.0, 0.001, 0, 1), Scale(0.9, 30000.0, 0, 1, log=True)])
def test_ticks_are_round_ordered_and_inside(scale):
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    assert all(scale.low <= t <= scale.high for t in ticks)
    assert all(float(f"{t:.2g}") == t for t in ticks)
    assert (scale(scale.low), scale(scale.high)) == (0, 1)


def test_octaves_are_ticked_by_powers_of_two():
    assert Scale(0.8, 70.0, 0, 1, log=True).ticks(octaves=True) == [1, 2, 4, 8, 16, 32, 64]


def log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_curves_of_a_resumed_run_are_read_as_they_were_last(tmp_path):
    rows = [{"step": s, "seconds": 1.0 * i, "skipped": 0, "loss": v} for i, (s, v) in enumerate([(10, 3.0), (20, 2.0), (10, 5.0)])]
    path = log(tmp_path / "log.jsonl", [*rows, {"step": 30, "seconds": 9.0, "skipped": 0, "loss": math.nan, "fake": 1}])
    curves = read_curves(path)
    assert list(curves) == ["loss", "fake"]
    assert curves["loss"][:2] == [(10, 5.0), (20, 2.0)]
    assert math.isnan(curves["loss"][2][1])
    assert curves["fake"] == [(30, 1.0)]
    assert str(read_curves(tmp_path)) == str(curves)
    log(path, [{"step": 1, "skipped": 0}, {"step": 2, "skipped": 1}])
    assert read_curves(path) == {"skipped": [(1, 0.0), (2, 1.0)]}


@pytest.mark.parametrize("content", ["{", "[1]", '{"loss": 1}', '{"step": 1, "loss": "high"}', '{"step": 1, "loss": null}'])
def test_a_log_of_something_else_is_the_users_error(content, tmp_path):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 1.0}}\n{content}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl"):
        read_curves(tmp_path)
    with pytest.raises(UserError, match="cannot read the log"):
        read_curves(tmp_path / "missing.jsonl")


def test_a_curve_goes_through_its_means_inside_its_band():
    svg = curve_svg([(step, 10.0 + (-1) ** step) for step in range(1200)], label="loss")
    (mean,) = [p.get("d", "") for p in drawn(svg, "path") if p.get("class") == "teacher-line"]
    heights = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", mean)}
    assert len(re.findall("[ML]", mean)) == 120
    assert max(heights) - min(heights) < 0.2
    (band,) = (p.get("points", "") for p in drawn(svg, "polygon"))
    edges = {float(pair.split(",")[1]) for pair in band.split()}
    assert sum(edges) / 2 == pytest.approx(heights.pop(), abs=0.2)


def test_a_gap_stays_where_values_are_not_finite():
    curve = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 3.0)]
    assert len([p for p in drawn(curve_svg(curve, label="loss"), "path") if p.get("class") == "teacher-line"]) == 2
    assert not drawn(curve_svg([(1, math.nan)], label="loss"), "polygon")


def test_values_that_span_much_are_in_the_logarithm():
    svg = curve_svg([(0, 1000.0), (1, 10.0), (2, 0.1)], label="loss")
    (mean,) = [p.get("d", "") for p in drawn(svg, "path") if p.get("class") == "teacher-line"]
    a, b, c = (float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", mean))
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert "loss (log)" in {t.text for t in drawn(svg, "text")}


SWEEP = [{"steps": k, "guidance_scale": g, "fd": fd} for k, g, fd in ((1, 1.0, 8.0), (1, 3.0, 4.0), (4, 1.0, 2.0), (4, 3.0, None))]
STUDENTS = [{"model": "student", "steps": 1, "fd": 2.0}, {"model": "other", "steps": 2, "fd": 4.0}]


def numbered(svg):
    """Text, x, y, colour and whether outlined of the numbered cells."""
    elements, found = list(ET.fromstring(svg)), []
    for cell, label in zip(elements, elements[1:], strict=False):
        if cell.tag.endswith("rect") and label.tag.endswith("text"):
            found.append(
                (label.text, float(cell.get("x", 0)), float(cell.get("y", 0)), cell.get("fill"), cell.get("stroke") is not None)
            )
    return found


def test_students_share_the_colours_and_the_steps_of_the_surface():
    cells = numbered(surface_svg(SWEEP, STUDENTS))
    assert [cell[0] for cell in cells] == ["8", "2", "4", "-", "2", "4"]
    (_, x8, y8, dearest, _), (_, x2, y2, cheapest, best), (_, x4, y4, middle, _), (_, xm, ym, missing, _), one, two = cells
    assert (x8, x2, y8, y4) == (x4, xm, y2, ym)
    assert y8 < y4 < one[2] < two[2]
    assert one[1] == x8 < two[1] < x2
    assert (one[3], two[3]) == (cheapest, middle)
    assert (dearest, cheapest, missing) == ("#fde725", "#440154", "#7f7f7f")
    assert middle == "#21918c"  # halfway in the logarithm
    assert [cell[4] for cell in cells] == [False, True, False, False, True, False]
    assert best


def test_the_png_shows_the_colours_of_the_svg(tmp_path):
    surface_png(tmp_path / "surface.png", SWEEP, STUDENTS, scale=2)
    pixels = np.asarray(Image.open(tmp_path / "surface.png"))
    for _, x, y, colour, _ in numbered(surface_svg(SWEEP, STUDENTS)):
        assert bytes(pixels[round(2 * y) + 10, round(2 * x) + 10]).hex() == colour[1:]


def test_a_surface_of_wrong_rows_is_the_users_error():
    row = {"steps": 1, "guidance_scale": 1.0, "fd": 1.0}
    for rows, says in (
        ([row, row], "two rows"),
        ([{**row, "steps": None}], "whole `steps`"),
        ([{"steps": 1, "fd": 1.0}], "`guidance_scale`"),
        ([{**row, "fd": None}], "nothing to draw"),
        ([], "nothing to draw"),
    ):
        with pytest.raises(UserError, match=says):
            surface_svg(rows)


@pytest.mark.parametrize(("log", "octaves"), [(True, False), (True, True), (False, False)])
def test_a_range_too_narrow_for_round_values_has_ticks_all_the_same(log, octaves):
    """Two students of equal cost are the usual comparison: 126.9 and 133.7 ms hold no 1, 2, 5 and no power of two."""
    ticks = Scale(129.0, 134.0, 0, 100, log=log).ticks(octaves=octaves)
    assert 2 <= len(ticks) <= 8
    assert all(129 <= tick <= 134 for tick in ticks)
