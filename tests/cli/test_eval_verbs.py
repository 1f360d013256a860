"""``fastdiff eval VERB``: each does what its help says, on tiny pipelines and folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.cli.main import main
from fastdiff.cli.verbs import VERBS
from fastdiff.eval.protocol import Protocol
from fastdiff.eval.report import read_rows, rows_json, rows_jsonl


def result(path: Path, fd: float, *, n: int = 2000, model: str = "student", record: bool = True) -> Path:
    """A result file of one row: fd with an error of 0.05."""
    row = {"model": model, "steps": 1, "nfe": 1.0, "fd": fd, "fd_se": 0.05, "attributes": 0.9, "attributes_se": 0.01, "n": n}
    facts = {"protocol": Protocol.load("fashion").replace(n=n).record} if record else {}
    rows_json(path, [row], **facts)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept by default goes below the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:06d}.png")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", verb, "--help"])
    assert stop.value.code == 0
    assert f"fastdiff eval {verb}" in capsys.readouterr().out


def test_compare_tells_noise_from_difference_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, near, worse = (result(tmp_path / f"{fd}.json", fd) for fd in (0.60, 0.70, 0.80))
    assert main(["eval", "compare", str(before), str(near), "--gate"]) == 0
    out = capsys.readouterr().out
    assert "+0.1" in out
    assert "differs" not in out  # 0.1 is below 2 sqrt(2) 0.05
    assert main(["eval", "compare", str(before), str(worse)]) == 0
    assert main(["eval", "compare", str(before), str(worse), "--gate"]) == 1
    assert "worse: fd of student" in capsys.readouterr().out
    assert main(["eval", "compare", str(worse), str(before), "--gate"]) == 0  # better is no regression


def test_compare_refuses_what_does_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = result(tmp_path / "a.json", 0.6)
    for name, other, says in (
        ("b", {"n": 500}, "n: 2000 and 500"),
        ("c", {"record": False}, "names no protocol"),
        ("d", {"model": "another"}, "no model of one name"),
    ):
        assert main(["eval", "compare", str(one), str(result(tmp_path / f"{name}.json", 0.6, **other))]) == 2
        assert says in capsys.readouterr().err


def test_report_is_made_again_from_rows_alone(tmp_path: Path) -> None:
    files = [str(result(tmp_path / f"{model}.json", 0.6, model=model)) for model in ("student a", "student b")]
    page = tmp_path / "page.html"
    assert main(["eval", "report", *files, "--output", str(page), "--previous", files[0], "--title", "of <two>"]) == 0
    text = page.read_text()
    assert Protocol.load("fashion").hash in text
    assert "student b" in text
    assert "of &lt;two&gt;" in text
    foreign = str(result(tmp_path / "c.json", 0.6, n=500))
    assert main(["eval", "report", files[0], foreign, "--output", str(tmp_path / "no.html")]) == 2
    assert not (tmp_path / "no.html").exists()


def test_statistics_are_those_that_an_evaluation_reads(tmp_path: Path, photographs: Path) -> None:
    protocol = tmp_path / "mine.toml"
    protocol.write_text('n = 12\nprompts = "mine"\npreprocess = "torch-bicubic"\nextractor = "random-conv"\nreference = "mine"\n')
    npz, out, prompts = tmp_path / "mine.npz", tmp_path / "out.json", tmp_path / "prompts.txt"
    assert main(["eval", "stats", str(photographs), "--protocol", str(protocol), "--output", str(npz), "--workers", "0"]) == 0
    prompts.write_text("".join(f"prompt {i}\n" for i in range(12)))
    words = ["eval", str(photographs), "--protocol", str(protocol), "--reference", str(npz), "--prompts", str(prompts)]
    assert main([*words, "--workers", "0", "--json", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert abs(stored["rows"][0]["fd"]) < 1e-3
    assert stored["evaluation"]["score"].startswith("FD[random-conv")
    assert stored["protocol"]["n"] == 12
    assert stored["protocol"]["prompts_sha256"] != ""
    lines, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    assert main([*words, "--workers", "0", "--json", str(lines), "--report", str(page)]) == 0
    (line,) = read_rows(lines)
    assert line["protocol"] == f"{stored['protocol']['name']}#{stored['protocol']['hash']}"
    assert stored["evaluation"]["score"] in page.read_text()


def test_a_pipeline_is_drawn_to_a_folder_and_scored(
    tmp_path: Path, photographs: Path, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol, prompts, out = tmp_path / "mine.toml", tmp_path / "prompts.txt", tmp_path / "out.json"
    protocol.write_text('n = 4\nprompts = "mine"\npreprocess = "torch-bicubic"\nextractor = "random-conv"\nreference = "mine"\n')
    prompts.write_text("a zebra\na red boot\na zebra\na bag\n")
    words = ["eval", str(stranger), "--protocol", str(protocol), "--prompts", str(prompts), "--images", str(tmp_path / "images")]
    words += ["--workers", "0", "--teacher-steps", "2", "--json", str(out)]
    assert main(words) == 2
    assert "give --reference" in capsys.readouterr().err
    assert main([*words, "--reference", str(photographs)]) == 0
    (row,) = read_rows(out)
    assert row["nfe"] == 4
    assert row["n"] == 4
    assert row["kid"] is not None
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4


def test_bench_measures_calls_and_sizes(tmp_path: Path, stranger: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--num-images", "3", "--batch-size", "2", "--repeats", "1", "--steps", "1", "2", "--guidance-scale", "2"]
    assert main(["eval", "bench", str(stranger), *words, "--json", str(out)]) == 0
    assert [row["nfe"] for row in read_rows(out)] == [2, 4]
    assert read_rows(out)[0]["size_mb"] == pytest.approx(sum(f.stat().st_size for f in stranger.rglob("*") if f.is_file()) / 1e6)


def test_grid_has_one_line_a_model(tmp_path: Path, photographs: Path, stranger: Path) -> None:
    picture = tmp_path / "grid.png"
    words = ["--columns", "3", "--steps", "1", "2", "--size", "32", "--output", str(picture)]
    assert main(["eval", "grid", str(stranger), str(photographs), *words]) == 0
    wide, high = Image.open(picture).size
    assert high > 3 * 32
    assert wide > 3 * 32


def test_a_sweep_has_a_row_a_cell_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "sweep.png"
    words = ["--steps", "1", "2", "--guidance", "1", "2", "--num-images", "6", "--output", str(picture)]
    assert main(["eval", "sweep", "fashion", *words]) == 0
    rows = read_rows(picture.with_suffix(".json"))
    assert [(row["steps"], row["guidance_scale"], row["nfe"]) for row in rows] == [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4)]
    assert all(np.isfinite(row["fd"]) for row in rows)
    assert torch.tensor(np.asarray(Image.open(picture).convert("RGB"))).float().std() > 1


def test_the_hash_is_of_the_reference_that_was_really_used(tmp_path: Path, photographs: Path) -> None:
    protocol, prompts = tmp_path / "mine.toml", tmp_path / "prompts.txt"
    protocol.write_text('n = 12\nprompts = "mine"\npreprocess = "torch-bicubic"\nextractor = "random-conv"\nreference = "mine"\n')
    prompts.write_text("".join(f"prompt {i}\n" for i in range(12)))
    other = tmp_path / "others"
    other.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 99)).save(other / f"picture{i}.png")
    files = []
    for reference in (photographs, other):
        files.append(tmp_path / f"{reference.name}.json")
        words = ["eval", str(photographs), "--protocol", str(protocol), "--reference", str(reference), "--prompts", str(prompts)]
        assert main([*words, "--workers", "0", "--json", str(files[-1])]) == 0
    hashes = {json.loads(file.read_text())["protocol"]["hash"] for file in files}
    assert len(hashes) == 2
    assert main(["eval", "compare", *map(str, files)]) == 2


def test_a_bundled_protocol_needs_no_reference_and_gives_the_distance_of_the_main_command(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--num-images", "40", "--teacher-steps", "1", "--images", str(tmp_path / "images"), "--workers", "0"]
    assert main(["eval", "fashion", "--protocol", "fashion", *words, "--json", str(out)]) == 0
    plain = tmp_path / "plain.json"
    assert main(["eval", "fashion", "--num-images", "40", "--teacher-steps", "1", "--json", str(plain)]) == 0
    one, other = read_rows(out)[0]["fd"], read_rows(plain)[0]["fd"]
    assert one == pytest.approx(other, rel=0.02)  # files hold 8 bits a channel


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "cmpare", "a", "b"], "did you mean 'compare'?"),
        (["eval", "fashion", "--json", "."], "--json . is a folder"),
        (["eval", "grid", "fashion", "--output", "."], "--output . is a folder"),
        (["eval", "fashion", "--protocol", "clean", "--num-images", "3"], "give --reference"),
    ],
)
def test_mistakes_are_said_before_any_work(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_prompts_that_would_change_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zebra\n")
    assert main(["eval", "fashion", "--prompts", str(prompts)]) == 2
    assert "changes nothing" in capsys.readouterr().err


def test_the_gate_does_not_open_for_a_score_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "student", "fd": 0.6, "fd_se": 0.05, "clip": 94.0, "clip_se": 0.1}
    rows_json(tmp_path / "a.json", [row, {**row, "model": "other"}])
    rows_json(tmp_path / "b.json", [{k: v for k, v in row.items() if not k.startswith("clip")}])
    words = ["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(words) == 0
    assert main([*words, "--gate"]) == 1
    assert "no longer there: other, clip of student" in capsys.readouterr().out


def test_lines_of_different_protocols_are_not_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x#1", "y#2"):
        rows_jsonl(tmp_path / f"{name[0]}.jsonl", [{"model": name, "fd": 0.5}], protocol=name)
    files = [str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")]
    assert main(["eval", "report", *files, "--output", str(tmp_path / "page.html")]) == 2
    assert "x#1 and y#2" in capsys.readouterr().err


def test_a_sweep_with_a_student_is_reported(tmp_path: Path) -> None:
    cell = {"model": "teacher, guidance 1 (1 step)", "steps": 1, "guidance_scale": 1.0, "fd": 5.0}
    rows_json(tmp_path / "sweep.json", [cell, {"model": "student a", "steps": 1, "guidance_scale": 1.0, "fd": 0.6}])
    one = result(tmp_path / "a.json", 0.6)
    page = tmp_path / "page.html"
    assert main(["eval", "report", str(one), "--output", str(page), "--sweep", str(tmp_path / "sweep.json")]) == 0
    assert "guidance" in page.read_text()


def test_a_grid_of_too_few_stored_images_is_a_message(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "grid", str(photographs), "--columns", "13", "--output", str(tmp_path / "g.png")]) == 2
    assert "has 12 images" in capsys.readouterr().err


def test_the_facts_of_all_files_are_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, seed, torch_version in (("a", 0, "2.1"), ("b", 1, "2.2")):
        row = {"model": name, "fd": 0.5, "n": 2000}
        facts = {"seed": seed, "score": "FD[x]", f"note on {name}": "JPEG"}
        rows_json(tmp_path / f"{name}.json", [row], evaluation=facts, environment={"torch": torch_version, "cores": "2"})
        files.append(str(tmp_path / f"{name}.json"))
    page = tmp_path / "page.html"
    assert main(["eval", "report", *files, "--output", str(page)]) == 0
    text = page.read_text()
    for name, value in (
        ("seed, a.json", "0"),
        ("seed, b.json", "1"),
        ("score", "FD[x]"),
        ("note on b, b.json", "JPEG"),
        ("torch, a.json", "2.1"),
        ("torch, b.json", "2.2"),
        ("cores", "2"),
    ):
        assert f"<tr><th>{name}</th><td>{value}</td></tr>" in text
    rows_json(tmp_path / "c.json", [{"model": "c", "fd": 0.5, "n": 2000}], evaluation={"score": "FD[y]"})
    assert main(["eval", "report", files[0], str(tmp_path / "c.json"), "--output", str(tmp_path / "no.html")]) == 2
    assert "of different networks" in capsys.readouterr().err
