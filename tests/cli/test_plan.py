"""``fastdiff plan``: the words of ``distill``, a text, a JSON file, and exit code 2 for what would be refused."""

import json
from dataclasses import asdict

import pytest
from tiny import tiny_pipeline

from fastdiff.cli.distill import parsed
from fastdiff.cli.main import main
from fastdiff.cli.plan import Options, size
from fastdiff.cli.training import run_options

WORDS = ["dmd2", "--fake-score", "lora", "--gan-weight", "1e-3", "--warm-start-steps", "100", "--pairs", "20", "--batch-size", "2"]


def test_help_explains_its_own_options_and_those_of_the_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--gpus", "--sharding", "--json", "--batch-size", "--pair-steps"))


def test_the_words_of_distill_are_understood(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: dmd2\nmax_steps: 7\nratio: [2, 3]\nevaluate: false\nnum_images: 4\n")
    words = ["--config", str(path), "--batch-size", "8", "--teacher-steps", "4"]
    run, *others = run_options(words, command="plan", run=Options)
    assert (run.teacher, run.evaluate, run.gpus) == ("fashion", False, 1)
    assert list(map(asdict, others)) == list(map(asdict, parsed(words)[1:]))


def test_the_text_and_the_file_say_the_same(tmp_path, capsys):
    path = tmp_path / "deep" / "plan.json"
    assert main(["plan", *WORDS, "--output", str(tmp_path / "run"), "--json", str(path), "--gpus", "2", "--sharding", "fsdp2"]) == 0
    shown, plan = capsys.readouterr().out.splitlines(), json.loads(path.read_text())
    assert shown[0] == "dmd2 on fashion: 2 GPUs, sharding fsdp2, 2 x 1 samples each, 1,000 iterations"
    rows = {line.split()[0]: line.split() for line in shown if line}
    assert " ".join(rows["role"]) == "role trains parameters trained dtype weights gradients optimiser average per GPU"
    assert rows["teacher"][:6] == ["teacher", "frozen", "1.93", "M", "0.00", "M"]
    assert rows["discriminator"][1:3] == ["module", "0.11"]
    assert (
        "iteration (student, fake_score), 180 of them: student 1 forward 1 backward, teacher 2 forward, "
        "fake_score 5 forward 4 backward" in shown
    )
    assert "warm start, 100 iterations: student 100 forward 100 backward" in shown
    assert "cycle, 5 iterations: student 5 forward 1 backward, teacher 2 forward, fake_score 17 forward 16 backward" in shown
    assert "before the first iteration, in samples: teacher 320 forward" in shown
    assert "student called at: 999" in shown
    assert "exported with: DPMSolverMultistepScheduler at 999" in shown
    assert any(line.startswith("times drawn: student_t 20..980, fake_t 0..999, gan_student_t 0..999") for line in shown)
    assert any(line.startswith("fsdp2 is planned only") for line in shown)
    assert f"on each GPU: {size(plan['resident'])} throughout, about {size(plan['peak'])} in the largest update" in shown
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_an_embedded_guidance_is_refused_with_its_plan(tmp_path, capsys):
    pipeline = tiny_pipeline()
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=4)
    pipeline.save_pretrained(tmp_path / "guided")
    (tmp_path / "prompts.txt").write_text("a zebra\n")
    words = ["plan", "swiftbrush", "--teacher", str(tmp_path / "guided"), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 2
    out, err = capsys.readouterr()
    assert "exported with: not possible" in out
    refusal = out.splitlines()[-1]
    assert refusal.startswith("- the network of guided embeds its guidance already (time_cond_proj_dim)")
    assert err.splitlines()[-1] == "fastdiff: this run would be refused for 1 reason, see above."
    assert json.loads((tmp_path / "plan.json").read_text())["refusals"] == [refusal.removeprefix("- ")]


def test_what_is_no_teacher_at_all_is_one_line(tmp_path, capsys):
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    pipeline.save_pretrained(tmp_path / "zero")
    for words, expected in [
        (["--teacher", str(tmp_path / "zero")], "zero-terminal SNR"),
        (["--teacher", str(tmp_path / "nothing")], "no folder"),
        (["--gpus", "0"], "gpus is 0"),
    ]:
        assert main(["plan", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith("fastdiff: ")
        assert expected in err


def test_sizes_are_for_people():
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]


@pytest.mark.parametrize("score", ["vsd", "cloud"])
def test_particles_are_planned_with_the_file_they_end_in(score, tmp_path, capsys):
    words = [
        "prolific-dreamer",
        "--scene",
        "voxels",
        "--scene-size",
        "8",
        "--score",
        score,
        "--max-steps",
        "10",
        "--batch-size",
        "2",
    ]
    assert main(["plan", *words, "--output", str(tmp_path / "run"), "--json", str(tmp_path / "plan.json")]) == 0
    shown, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "exported with: scenes.safetensors" in shown
    assert plan["roles"]["student"]["trainable"] == 4 * (8**3 * 5 + 4)  # particles of a density, four colours and backgrounds
    forward = {"vsd": 1, "cloud": 5}[score]
    assert plan["iterations"][0]["calls"]["student"] == {"forward": forward, "backward": 1}
    assert plan["unknown"] == []
    assert plan["updates"]["student"]["activations"] > 0
