"""``fastdiff distill-multi``: the stages it makes of its options, and a run of two students, one at a time."""

from pathlib import Path

import pytest
from tiny import tiny_pipeline

from fastdiff.cli.distill_multi import MultiRun, stages_of
from fastdiff.cli.main import main
from fastdiff.errors import UserError
from fastdiff.trainers import DMD2, ODEPairs
from fastdiff.trainers.config import Config


def test_the_stages_are_those_of_the_paper_in_their_order() -> None:
    options = MultiRun(width=0.5, tsm_steps=7, adversarial_steps=9, adversarial_weight=0.2)
    stages = stages_of(options, Config(max_steps=8), DMD2(warm_start_steps=3))
    assert [(name, stage.config.max_steps, stage.shared) for name, stage in stages.items()] == [
        ("tsm", 7, True), ("dm", 8, False), ("adm", 9, False)
    ]  # fmt: skip
    tsm, dm, adm = (stage.method for stage in stages.values())
    assert (tsm.width, dm.gan_weight, dm.warm_start_steps, adm.gan_weight, adm.warm_start_steps) == (0.5, 0.0, 3, 0.2, 0)
    assert list(stages_of(MultiRun(), Config(), DMD2())) == ["dm"]


def test_an_adversarial_stage_needs_a_gan_term() -> None:
    with pytest.raises(UserError, match="no GAN term"):
        stages_of(MultiRun(adversarial_steps=1), Config(), ODEPairs())


def test_two_machines_make_one_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red boot\na blue bag\na black coat\na pink shirt\n")
    words = ["distill-multi", "dmd2", "--teacher", str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.txt")]
    words += ["--output", str(tmp_path / "out"), "--students", "2", "--partition", "blocks", "--no-evaluate"]
    words += ["--max-steps", "1", "--batch-size", "2", "--validate-every", "0", "--ema-decay", "0"]
    assert main([*words, "--student", "1"]) == 0
    assert "students 0 are still to be trained" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert main([*words, "--student", "0"]) == 0
    assert "students of 2, 2 prompts" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").exists()
