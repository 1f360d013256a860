"""``fastdiff distill`` from words to the folder, its table and its pictures, and mistakes that users make."""

import dataclasses
import errno
import json
import shlex
import shutil
import signal

import pytest
from PIL import Image

from fastdiff.cli.distill import parsed
from fastdiff.cli.main import main
from fastdiff.cli.methods import methods
from fastdiff.cli.training import DEFAULT_METHOD, choose, engine_options

TINY = ["--pairs", "8", "--pair-steps", "2", "--batch-size", "4", "--max-steps", "3", "--validate-every", "0"]


def last_line(capsys):
    """What a failed command said: its stdout, and the one line of ours that ends stderr; bars may stand before it."""
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    line = err.rstrip("\n").splitlines()[-1]
    assert line.startswith("fastdiff: ")
    return out, line


@pytest.mark.parametrize("name", sorted(methods()))
def test_help_explains_every_option_of_engine_and_method(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distill", name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for cls in (engine_options(), methods()[name].load()):
        for field in dataclasses.fields(cls):
            option = "--output" if field.name == "output_dir" else f"--{field.name.replace('_', '-')}"
            assert f"{option} " in shown or f"{option}, " in shown


def test_without_words_it_is_the_default_method_on_the_bundled_teacher():
    run, config, method, measuring = parsed([])
    assert (run.teacher, run.prompts, run.evaluate) == ("fashion", None, True)
    assert method.name() == DEFAULT_METHOD
    assert str(config.output_dir) == f"runs/{DEFAULT_METHOD}-fashion"
    assert (measuring.num_images, measuring.teacher_steps, measuring.teacher_guidance_scale) == (None, None, None)
    assert measuring.rows_of_teacher == ((25, 1), 3.0)


def test_the_default_output_is_named_after_method_and_teacher():
    assert str(parsed(["dmd2", "--teacher", "some/where/sd"])[1].output_dir) == "runs/dmd2-sd"
    assert str(parsed(["dmd2", "--output", "here"])[1].output_dir) == "here"


def test_a_yaml_file_may_name_the_method_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: dmd2\nmax_steps: 7\nratio: [2, 3]\noutput: there\nevaluate: false\nteacher_steps: [4]\n")
    run, config, method, measuring = parsed(["--config", str(path), "--max-steps", "9"])
    assert (method.name(), method.ratio) == ("dmd2", (2, 3))
    assert (config.max_steps, str(config.output_dir), run.evaluate, measuring.teacher_steps) == (
        9,
        "there",
        False,
        (4,),
    )
    assert choose(["swiftbrush", f"--config={path}"])[0].name == "swiftbrush"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a zebra\n\na red boot\n")
    return path


@pytest.fixture
def words(stranger, prompts, tmp_path):
    return [
        "distill",
        "ode-pairs",
        "--teacher",
        str(stranger),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "run"),
        *TINY,
    ]


def test_a_teacher_from_elsewhere_ends_in_a_folder_rows_of_cost_and_pictures(words, tmp_path, capsys):
    measured = [*words, "--teacher-steps", "2", "1", "--num-images", "2"]
    assert main(measured) == 0
    shown, folder = capsys.readouterr().out, tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["teacher (2 steps)", "teacher (1 step)", "student (1 step)"]
    assert [row["nfe"] for row in rows.values()] == [4, 2, 1]
    assert rows["student (1 step)"]["guidance_scale"] == 1
    assert {"latency_ms_p50", "images_per_s"} <= set(rows["student (1 step)"])
    assert result["export_max_abs_diff"] < 1e-5
    assert result["seconds_train"] > 0
    assert (result["seed"], result["steps"], result["method"]) == (0, 3, "ode-pairs")
    assert shlex.split(result["command"]) == ["fastdiff", *measured]
    assert "teacher (2 steps)" in (folder / "report.html").read_text()
    assert "teacher (2 steps)" in shown
    assert f"picture  {folder / 'grid.png'}" in shown
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model_index.json").exists()

    assert main(words) == 2
    _, line = last_line(capsys)
    assert "checkpoints of an earlier run" in line
    assert "--resume" in line


def test_ctrl_c_leaves_a_run_that_the_printed_line_finishes(words, tmp_path, capsys, monkeypatch):
    from fastdiff.trainers.ode_pairs import ODEPairs

    loss, calls = ODEPairs.loss, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *args)

    monkeypatch.setattr(ODEPairs, "loss", interrupted)
    monkeypatch.setattr("fastdiff.pipelines.export.verify_export", lambda *_: 0.0)  # ten seconds; tested above
    assert main([*words, "--no-evaluate"]) == 130
    err, folder = capsys.readouterr().err, tmp_path / "run"
    assert "Traceback" not in err
    assert "fastdiff: stopped after 2 of 3 iterations" in err
    assert not (folder / "model_index.json").exists()
    again = shlex.split(err.rstrip("\n").splitlines()[-1])
    assert again == ["fastdiff", *words, "--no-evaluate", "--resume"]
    assert main(again[1:]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert (result["rows"], result["steps"]) == ([], 3)
    assert len(calls) == 3
    assert not (folder / "report.html").exists()


def test_ctrl_c_before_the_first_checkpoint_offers_a_new_start_not_a_resume(words, capsys, monkeypatch):
    from fastdiff.trainers.engine import Trainer

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert "start again" in err
    assert "--resume" not in err


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(words, tmp_path, capsys, monkeypatch):
    from fastdiff.data.pairs import Pairs

    def full(self, path, settings):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Pairs, "save", full)
    assert main(words) == 2
    out, line = last_line(capsys)
    assert out == ""
    assert "the disk is full" in line
    assert "--output" in line
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"log.jsonl"}


def without_index(folder):
    (folder / "model_index.json").unlink()


def truncated_index(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text()[:40])


def truncated_weights(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def truncated_text_encoder(folder):
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def no_weights(folder):
    (path,) = (folder / "unet").glob("*.safetensors")
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "no folder"),
        (without_index, "no model_index.json"),
        (truncated_index, "cannot load"),
        (truncated_weights, "cannot load"),
        (truncated_text_encoder, "cannot load"),
        (no_weights, "cannot load"),
    ],
)
def test_a_damaged_teacher_is_one_line(damage, expected, stranger, prompts, tmp_path, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(stranger, folder)
    damage(folder)
    output = tmp_path / "run"
    assert main(["distill", "--teacher", str(folder), "--prompts", str(prompts), "--output", str(output)]) == 2
    out, line = last_line(capsys)
    assert out == ""
    assert expected in line
    assert str(folder) in line
    assert len(line) < 600
    assert not output.exists()


def test_bad_prompts_are_one_line(stranger, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    base = ["distill", "--teacher", str(stranger), "--output", str(tmp_path / "run")]
    for name in ("empty.txt", "binary.txt", "missing.txt"):
        assert main([*base, "--prompts", str(tmp_path / name)]) == 2
        assert name in last_line(capsys)[1]
    assert main(base) == 2
    assert "prompts" in last_line(capsys)[1]
    assert not (tmp_path / "run").exists()


def test_wrong_words_are_refused_before_anything_is_loaded(tmp_path, capsys):
    for words, expected in [
        (["ode-pear"], f"no method 'ode-pear', did you mean 'ode-pairs'? Methods: {', '.join(methods())}."),
        (["--config"], "--config needs a file."),
        (["--config", str(tmp_path / "no.yaml")], "no.yaml cannot be read: No such file or directory."),
    ]:
        assert main(["distill", *words]) == 2
        assert last_line(capsys)[1].endswith(expected)
    (tmp_path / "run.yaml").write_text("max_stpes: 4\n")
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "no option 'max_stpes', did you mean 'max_steps'?" in last_line(capsys)[1]
    for words in (["--max-stpes", "4"], ["--max-steps", "0"], ["swiftbrush", "dmd2"]):
        with pytest.raises(SystemExit) as stopped:
            main(["distill", *words])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "max" in err or "dmd2" in err


def test_an_output_that_is_a_file_is_one_line(words, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert main(words) == 2
    assert str(tmp_path / "run") in last_line(capsys)[1]
    assert (tmp_path / "run").read_text() == "mine"


def test_the_bundled_teacher_ends_in_the_table_with_real_photographs(tmp_path, capsys):
    words = ["distill", "--output", str(tmp_path / "run"), *TINY, "--num-images", "20", "--teacher-steps", "2", "1"]
    assert main(words) == 0
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "teacher (2 steps)",
        "teacher (1 step)",
        "student (1 step)",
        "real (held-out)",
    ]
    assert all(row["n"] == 20 and row["fd"] > 0 and 0 <= row["attributes"] <= 1 for row in rows)
    assert "real (held-out)" in capsys.readouterr().out


def test_particles_end_as_scenes_with_a_turntable_and_are_not_measured(tmp_path, capsys):
    words = ["prolific-dreamer", "--scene", "gaussians", "--scene-size", "4", "--particles", "2", "--batch-size", "2"]
    assert main(["distill", *words, "--max-steps", "2", "--validate-every", "1", "--output", str(tmp_path / "run")]) == 0
    assert "fastdiff.models.scenes.load_scenes" in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"scenes.safetensors", "fastdiff.json", "turntable.gif", "result.json", "validation"} <= made
    assert not made & {"model_index.json", "unet", "report.html"}
    note = json.loads((tmp_path / "run" / "fastdiff.json").read_text())
    assert (note["method"], note["timesteps"], note["scenes"]["particles"]) == ("prolific-dreamer", [], 2)
    with Image.open(tmp_path / "run" / "turntable.gif") as film:
        assert film.n_frames > 1
