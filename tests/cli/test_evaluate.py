"""``fastdiff eval``: rows of pipelines from anywhere."""

import json

import pytest
from PIL import Image

from fastdiff.cli.evaluate import Options as EvalOptions
from fastdiff.cli.evaluate import check, of_the_world
from fastdiff.cli.main import main
from fastdiff.errors import UserError


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a zebra\n")
    return path


def test_a_teacher_from_elsewhere_gets_rows_of_cost_and_every_output(stranger, prompts, tmp_path, capsys):
    words = ["eval", str(stranger), "--prompts", str(prompts), "--num-images", "2", "--teacher-steps", "3", "1"]
    outputs = [f"--{kind}={tmp_path / 'out' / kind}.{end}" for kind, end in (("json", "json"), ("report", "html"), ("grid", "png"))]
    assert main([*words, *outputs]) == 0
    rows = json.loads((tmp_path / "out" / "json.json").read_text())["rows"]
    assert [(row["model"], row["nfe"], row["n"]) for row in rows] == [
        ("teacher (3 steps)", 6, 2),
        ("teacher (1 step)", 2, 2),
    ]
    shown = capsys.readouterr().out
    assert all(row["model"] in shown for row in rows)
    assert "teacher (3 steps)" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_students_are_told_by_their_note_and_named_by_their_folder(tmp_path):
    for name in ("a/one", "a/two", "b/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "fastdiff.json").write_text("{}")
    one, two, other = (str(tmp_path / name) for name in ("a/one", "a/two", "b/one"))
    assert check(EvalOptions(pipelines=("fashion", one, two))) == ({"one": one, "two": two}, "fashion")
    assert check(EvalOptions(pipelines=(one, other))) == ({one: one, other: other}, None)
    with pytest.raises(UserError, match="one teacher at a time"):
        check(EvalOptions(pipelines=("fashion", "owner/model")))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-images", "1"], "--num-images is 1; it must be at least 2."),
        (["--teacher-steps", "0"], "--teacher-steps holds 0"),
        (["--prompts", "missing.txt"], "cannot read the prompts file missing.txt"),
        ([], "give --prompts"),
    ],
)
def test_wrong_options_are_one_line(words, expected, stranger, capsys):
    assert main(["eval", str(stranger), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert expected in err


def test_the_world_is_known_by_its_vocabulary(stranger):
    from fastdiff.data.fashion import gemma_tokenizer, tokenizer
    from fastdiff.models.teacher import load_pipeline

    pipeline = load_pipeline(stranger)
    assert not of_the_world(pipeline)
    for known in (tokenizer(), gemma_tokenizer()):
        pipeline.tokenizer = known
        assert of_the_world(pipeline)


def test_a_folder_that_is_not_there_is_blamed_and_not_the_teacher(stranger, tmp_path, capsys):
    for words in (["sweep", "fashion", "runs/nope", "--output", str(tmp_path / "x.png")], ["fashion", "runs/nope"]):
        assert main(["eval", *words]) == 2
        assert "there is no folder runs/nope" in capsys.readouterr().err
    assert main(["eval", str(stranger), str(tmp_path / "nope")]) == 2
    assert f"there is no folder {tmp_path / 'nope'}" in capsys.readouterr().err


def test_a_folder_of_images_is_told_of_the_protocol_it_needs(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert main(["eval", str(tmp_path)]) == 2
    assert "is a folder of images, whose scores need a protocol: give --protocol" in capsys.readouterr().err


def test_missing_weights_are_asked_for_in_words_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDIFF_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (99 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    words = ["eval", "stats", str(tmp_path / "images"), "--protocol", "clean", "--output", str(tmp_path / "x.npz")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "give --weights PATH, or put it into the folder that FASTDIFF_WEIGHTS names." in err
    assert "weights=" not in err
    assert "allow_download" not in err
