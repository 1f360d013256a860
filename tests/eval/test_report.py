import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.eval.evaluate import Result
from fastdiff.eval.plot import plot_svg
from fastdiff.eval.report import eight_bit, environment, grid_png, html_report, rows_json, table

PROMPTS = ["a red boot on a white background", "a blue bag on a pink background", "a cyan coat on a black background"]


def result(model: str, fd: float, nfe: float | None, colour: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> Result:
    images = torch.tensor(colour)[None, :, None, None] * torch.tensor([1.0, 0.6, 0.2])[:, None, None, None]
    return Result(
        model=model,
        n=3,
        metrics={"fd": fd, "fd_se": 0.0123, "clip": 31.5, "clip_se": 0.25},
        nfe=nfe,
        images=images.expand(3, 3, 8, 8),
        prompts=PROMPTS,
    )


RESULTS = [
    result("teacher (25 steps)", 1.25, 50.0),
    result("student (1 step)", 1.5, 1.0, (0.0, 0.0, 1.0)),
    result("real (held-out)", 0.5, None, (0.0, 1.0, 0.0)),
]


def test_grid_has_a_row_for_each_model_and_a_column_for_each_prompt(tmp_path):
    path = tmp_path / "new" / "grid.png"
    grid_png(path, {r.model: r.images for r in RESULTS}, PROMPTS, size=40)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    height, width, _ = sheet.shape
    left, top = width - 3 * 40, height - 3 * 40
    for i, channel in enumerate((0, 2, 1)):
        for j, level in enumerate((255, 153, 51)):
            cell = sheet[top + 40 * i : top + 40 * (i + 1), left + 40 * j : left + 40 * (j + 1)]
            assert (cell[..., channel] == level).all()
            assert cell.sum() == 1600 * level
    for j in range(3):
        assert (sheet[:top, left + 40 * j : left + 40 * (j + 1)] < 128).any()  # the prompt above its column
        assert (sheet[top + 40 * j : top + 40 * (j + 1), :left] < 128).any()  # the model beside its row


def test_grid_shows_no_more_columns_than_asked(tmp_path):
    widths = []
    for columns in (2, 3, 9):
        grid_png(tmp_path / "grid.png", {"x": RESULTS[0].images}, PROMPTS, columns=columns, size=40)
        widths.append(Image.open(tmp_path / "grid.png").width)
    assert widths[1] - widths[0] == 40
    assert widths[2] == widths[1]


def test_pixels_are_rounded_not_truncated():
    levels = torch.tensor([0.0, 0.4999, 0.5001, 254.6, 255.0, 300.0]) / 255
    pixels = np.asarray(eight_bit(levels.expand(3, 1, -1)))[0, :, 0]
    assert pixels.tolist() == [0, 0, 1, 255, 255, 255]


def test_table_aligns_and_shows_errors():
    lines = table([r.row() for r in RESULTS]).splitlines()
    assert lines[0].split() == ["model", "NFE", "FD", "CLIP", "n"]
    assert lines[1].split() == ["teacher", "(25", "steps)", "50", "1.25", "±", "0.012", "31.5", "±", "0.25", "3"]
    assert lines[3].split()[2] == "-"
    assert len({len(line) for line in lines}) == 1


def test_json_holds_rows_and_facts(tmp_path):
    rows_json(tmp_path / "out.json", RESULTS, seed=3, seconds_train=1.5)
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["seed"] == 3
    assert data["seconds_train"] == 1.5
    assert data["rows"] == [r.row() for r in RESULTS]
    assert data["rows"][2]["nfe"] is None
    assert "images" not in data["rows"][0]


def test_json_refuses_nan_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows_json(tmp_path / "out.json", [result("student", float("nan"), 1.0)])
    assert not list(tmp_path.iterdir())


def test_plot_puts_calls_in_octaves_and_quality_from_zero():
    rows = [{"model": f"teacher ({k})", "nfe": float(k), "fd": fd} for k, fd in ((1, 4.0), (8, 2.0), (64, 1.0))]
    tree = ET.fromstring(plot_svg([*rows, {"model": "real", "nfe": None, "fd": 0.5}, {"model": "no fd", "nfe": 2.0}]))
    points = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in tree.iter() if c.tag.endswith("circle")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(2 * (y2 - y1), abs=0.3)
    dashed = [p for p in tree.iter() if p.get("stroke-dasharray")]
    assert len(dashed) == 1
    floor = float(re.findall(r"M\d+ ([\d.]+)H", dashed[0].get("d", ""))[0])
    assert floor - y2 == pytest.approx((y2 - y1) / 2, abs=0.3)


def test_plot_of_one_row_and_of_none():
    assert plot_svg([{"model": "student (1 step)", "nfe": 1.0, "fd": 0.0}]).count("<circle") == 1
    assert plot_svg([]).count("<circle") == 0


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "report.html"
    html_report(path, RESULTS, title="run <1>", command="fastdiff eval a & b", facts={"seed": 7})
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "<script" not in page
    assert "<h1>run &lt;1&gt;</h1>" in page
    assert "<pre>fastdiff eval a &amp; b</pre>" in page
    assert "<td>1.25 ± 0.012</td>" in page
    assert "<tr><td>seed</td><td>7</td></tr>" in page
    assert f"<td>{torch.__version__.split('+')[0]}" in page
    assert page.count("<circle") == 2
    encoded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(encoded) == 1
    grid_png(tmp_path / "grid.png", {r.model: r.images for r in RESULTS}, PROMPTS)
    inline = Image.open(io.BytesIO(base64.b64decode(encoded[0])))
    assert (np.asarray(inline) == np.asarray(Image.open(tmp_path / "grid.png"))).all()


def test_environment_names_versions_and_threads():
    facts = environment()
    assert facts["threads"] == str(torch.get_num_threads())
    assert {"python", "torch", "diffusers", "cores"} <= set(facts)
