import base64
import hashlib
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.errors import UserError
from fastdiff.eval.evaluate import Result
from fastdiff.eval.frechet import FD
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.report import (
    eight_bit,
    environment,
    grid,
    grid_png,
    html_report,
    read_rows,
    rows_json,
    rows_jsonl,
    table,
)
from fastdiff.eval.report.classes import worst
from fastdiff.eval.report.columns import number
from fastdiff.eval.report.pictures import inline
from fastdiff.eval.stats import Score

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
    assert "FD mean" not in table([r.row() for r in RESULTS], brief=True)
    assert table([r.row() for r in RESULTS], brief=True, names={"fd": "FD[x]#1"}).splitlines()[0].split().count("FD[x]#1") == 1
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


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "report.html"
    html_report(path, RESULTS, title="run <1>", command="fastdiff eval a & b", facts={"seed": 7, "calls": {"student": 3}})
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|action|data)=[\"'](?!data:image/png;base64,)", page)
    assert not re.search(r"@import|url\(", page)
    assert page.count("<script") == 1
    assert "<h1>run &lt;1&gt;</h1>" in page
    assert "<pre>fastdiff eval a &amp; b</pre>" in page
    assert '<td data-value="1.25">1.25 <span class="se">± 0.012</span></td>' in page
    assert "<tr><th>seed</th><td>7</td></tr><tr><th>calls</th><td>student: 3</td></tr>" in page
    assert f"<td>{torch.__version__.split('+')[0]}" in page
    assert page.count("<circle") == 2


def test_policy_allows_exactly_the_style_and_the_script_of_the_page(tmp_path):
    html_report(tmp_path / "report.html", RESULTS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = dict(part.strip().split(" ", 1) for part in re.findall(r'Policy" content="([^"]+)"', page)[0].split(";"))
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
    assert (policy["default-src"], policy["img-src"]) == ("'none'", "data:")


def test_images_of_the_page_are_the_pixels_of_each_model_and_prompt(tmp_path):
    html_report(tmp_path / "report.html", RESULTS, columns=2)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    assert [alt for alt, _ in found] == [f"{r.model}: {prompt}" for r in RESULTS for prompt in PROMPTS[:2]]
    for (_, encoded), expected in zip(found, (image for r in RESULTS for image in r.images[:2]), strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        assert (shown == np.asarray(eight_bit(expected))).all()


def test_large_images_are_reduced_for_the_page_and_for_the_grid():
    stripes = torch.zeros(3, 384, 768)
    stripes[:, :, ::2] = 1.0
    small = Image.open(io.BytesIO(base64.b64decode(inline(stripes).split(",")[1])))
    assert small.size == (192, 96)
    sheet = np.asarray(grid({"x": stripes[None]}, ["p"], size=96))[-96:, -96:]
    for pixels in (np.asarray(small), sheet):  # one pixel in four by itself would be black or white all over
        assert abs(pixels[8:-8, 8:-8].astype(int) - 127.5).max() < 16


def test_a_page_of_written_rows_equals_that_of_the_results(tmp_path):
    results = [replace(r, groups={"boot": FD(2.0, 0.5, 1.0, 1.0)}) for r in RESULTS]
    options = {"machine": {"python": "3"}, "protocol": Protocol.load("fashion").replace(n=3)}
    html_report(tmp_path / "now.html", results, **options)
    for write, name in ((rows_json, "rows.json"), (rows_jsonl, "rows.jsonl")):
        write(tmp_path / name, results)
        html_report(tmp_path / "read.html", read_rows(tmp_path / name), **options)
        now, read = ((tmp_path / page).read_text(encoding="utf-8") for page in ("now.html", "read.html"))
        start, end = now.index("<h2>Images"), now.index("<h2>Classes")
        assert read == now[:start].rstrip("\n") + "\n" + now[end:]


def test_a_picture_stands_in_for_the_images(tmp_path):
    grid_png(tmp_path / "grid.png", {r.model: r.images for r in RESULTS}, PROMPTS)
    html_report(tmp_path / "report.html", [r.row() for r in RESULTS], picture=tmp_path / "grid.png")
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert base64.b64decode(encoded) == (tmp_path / "grid.png").read_bytes()
    (tmp_path / "fake.png").write_text("<svg onload=alert(1)>")
    for name in ("fake.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            html_report(tmp_path / "other.html", [RESULTS[0].row()], picture=tmp_path / name)


def test_heads_of_scores_carry_the_protocol_and_costs_do_not(tmp_path):
    protocol = Protocol.load("fashion").replace(n=3)
    html_report(tmp_path / "report.html", RESULTS, protocol=protocol, names={"clip": "CLIP score"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    heads = [re.sub("<[^>]+>", "", head) for head in re.findall(r"<button.*?</button>", page)]
    assert heads[:5] == ["model", "NFE", protocol.label("FD[fashion]"), protocol.label("CLIP score"), "n"]
    for key, value in protocol.choices.items():
        shown = "left open" if value in (None, "", ()) else str(value)
        assert f"<tr><th>{key}</th><td>{html.escape(shown)}</td></tr>" in page
    assert f"<code>#{protocol.hash}</code>" in page


def test_rows_of_another_n_do_not_get_the_protocols_hash(tmp_path):
    with pytest.raises(UserError, match=r"n=3, fashion says n=2000.*replace\(n=3\)"):
        html_report(tmp_path / "report.html", RESULTS, protocol=Protocol.load("fashion"))
    with pytest.raises(UserError, match="one result or more"):
        html_report(tmp_path / "report.html", [])
    assert not list(tmp_path.iterdir())


def test_classes_are_listed_from_the_worst(tmp_path):
    classes = {f"c{i}": Score((7 * i) % 12 + 0.5, 0.1) for i in range(12)} | {"lost": Score(float("nan"), 0.1)}
    by_value = sorted((name for name in classes if name != "lost"), key=lambda name: classes[name].value)
    assert worst(classes) == by_value[::-1][:10]
    assert worst(classes, column="clip") == by_value[:10]
    html_report(tmp_path / "report.html", RESULTS, groups={"a": classes, "b": {"c0": Score(0.25, float("nan"))}})
    section = (tmp_path / "report.html").read_text(encoding="utf-8").partition("<h2>Classes</h2>")[2]
    assert "The worst 10 of 13" in section
    first = '<tr><th scope="row" data-value="1">1</th><td>c5 <span class="se">11.5 ± 0.1</span></td>'
    assert f'{first}<td>c0 <span class="se">0.25 </span></td></tr>' in section
    c0 = '<td data-value="0.5">0.5 <span class="se">± 0.1</span></td><td data-value="0.25">0.25</td>'
    assert f'<tr><th scope="row">c0</th>{c0}</tr>' in section
    assert '<tr><th scope="row">lost</th><td>-</td><td>-</td></tr>' in section


def test_changes_of_the_page_are_judged_by_their_errors(tmp_path):
    now = [r.row() for r in RESULTS]
    before = [{**now[0], "fd": 1.5}, {**now[1], "fd": 1.49, "clip": 40.0}, {**now[2], "model": "real <old>"}]
    html_report(tmp_path / "report.html", RESULTS, previous=before)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = [
        re.sub("<[^>]+>", "|", row) for row in re.findall(r"<tr>.*?</tr>", page.partition("What changed")[2].partition("<h2>")[0])
    ]
    assert [("yes, better" in row, "yes, worse" in row) for row in rows[1:]] == [(True, False), (False, False), (False, True)]
    assert "-0.25" in rows[1]
    options = {"previous": [{**now[0], "protocol": "other#1"}], "protocol": Protocol.load("fashion").replace(n=3)}
    with pytest.raises(UserError, match="under other#1 before and fashion"):
        html_report(tmp_path / "other.html", RESULTS, **options)
    assert "New: real (held-out)." in page
    assert "Gone: real &lt;old&gt;." in page


@pytest.mark.parametrize(("text", "shown"), [(None, "-"), (12, "12"), (0.123456, "0.1235"), (float("nan"), "nan"), ("a", "a")])
def test_numbers_have_four_digits(text, shown):
    assert number(text) == shown


def test_environment_names_versions_and_threads():
    facts = environment()
    assert facts["threads"] == str(torch.get_num_threads())
    assert {"python", "torch", "diffusers", "cores"} <= set(facts)
