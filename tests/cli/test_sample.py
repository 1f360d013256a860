"""``fastdiff sample``: the picture, and nothing half-written."""

import errno
import json
import shutil

import pytest
from PIL import Image

from fastdiff.cli.main import main


def test_one_prompt_makes_a_square_and_several_make_rows(stranger, tmp_path, capsys):
    folder = str(stranger)
    one, rows = tmp_path / "deep" / "one.png", tmp_path / "rows.png"
    assert main(["sample", folder, "--prompt", "a zebra", "--num-images", "4", "--steps", "2", "--output", str(one)]) == 0
    assert capsys.readouterr().out == f"4 images in {one}\n"
    assert Image.open(one).size == (256, 256)
    several = ["--prompt", "a zebra", "a boot", "--num-images", "3", "--batch-size", "2", "--steps", "1"]
    assert main(["sample", folder, *several, "--output", str(rows)]) == 0
    assert Image.open(rows).size == (384, 256)


def test_the_seed_decides_the_picture(stranger, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        words = ["--prompt", "a zebra", "--num-images", "1", "--steps", "1", "--seed", seed]
        assert main(["sample", str(stranger), *words, "--output", str(tmp_path / f"{name}.png")]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_negative_prompt_changes_the_picture_unless_its_scale_is_off(stranger, tmp_path):
    cases = {
        "bare": [],
        "off": ["--negative-prompt", "boot", "--negative-scale", "0"],
        "nasa": ["--negative-prompt", "boot"],
        "nag": ["--negative-prompt", "boot", "--negative-rule", "nag"],
    }
    for name, words in cases.items():
        call = ["--prompt", "a zebra", "--num-images", "1", "--steps", "1", "--guidance-scale", "1", *words]
        assert main(["sample", str(stranger), *call, "--output", str(tmp_path / f"{name}.png")]) == 0
    pictures = {name: (tmp_path / f"{name}.png").read_bytes() for name in cases}
    assert pictures["bare"] == pictures["off"]
    assert len(set(pictures.values())) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "x", "--num-images", "0"], "--num-images is 0"),
        (["--prompt", "x", "--steps", "-1"], "--steps is -1"),
        (["--prompt", "x", "--negative-scale", "0.2"], "there is no --negative-prompt"),
        (["--prompt", "x", "--negative-prompt", "y", "--negative-scale", "-1"], "--negative-scale: nasa scale is -1.0"),
        (["--prompt", "x", "--negative-prompt", "y"], "--negative-prompt: guidance_scale is 7.5"),
        (["--prompt", "x", "--output", "grid.txt"], "does not end like an image file"),
        (["--prompt", "x", "--device", "quantum"], "--device quantum cannot be used here"),
    ],
)
def test_wrong_options_are_one_line(words, expected, stranger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(stranger), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_picture_and_no_part_of_the_new(stranger, tmp_path, monkeypatch, capsys):
    import fastdiff.data.images

    output = tmp_path / "grid.png"
    output.write_bytes(b"old")

    def full(images, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(fastdiff.data.images, "save_grid", full)
    assert main(["sample", str(stranger), "--prompt", "x", "--num-images", "1", "--steps", "1", "--output", str(output)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert output.read_bytes() == b"old"


def test_steps_of_a_student_of_one_step_are_refused_and_its_own_is_not(stranger, tmp_path, capsys):
    student = shutil.copytree(stranger, tmp_path / "student")
    (student / "fastdiff.json").write_text(json.dumps({"num_inference_steps": 1}))
    words = ["sample", str(student), "--prompt", "a zebra", "--num-images", "1", "--output", str(tmp_path / "grid.png")]
    assert main([*words, "--steps", "4"]) == 2
    assert "is a student of one step, and --steps 4 would change nothing" in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()
    assert main([*words, "--steps", "1"]) == 0


@pytest.mark.parametrize("steps", ["4", "1"])
def test_any_steps_of_a_deterministic_student_of_four_are_refused(stranger, tmp_path, capsys, steps):
    """Its scheduler makes the four of a bare call; told of four it would make one, without a word."""
    student = shutil.copytree(stranger, tmp_path / "student")
    (student / "fastdiff.json").write_text(json.dumps({"num_inference_steps": 4}))
    assert main(["sample", str(student), "--prompt", "x", "--steps", steps, "--output", str(tmp_path / "grid.png")]) == 2
    assert "leave --steps out" in capsys.readouterr().err
