"""What a run refuses before it starts."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher
from torch import nn

from fastdiff import Teacher
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.errors import UserError
from fastdiff.trainers import DMD2, ODEPairs, checkpoint
from fastdiff.trainers._checks import check_folder, check_precision, check_steps, checks
from fastdiff.trainers.config import Config


def flow_teacher() -> Teacher:
    return Teacher.from_module(nn.Linear(2, 2), RectifiedFlow(), "flow_prediction", shape=(2,), prompts=["a"])


def test_a_whole_teacher_passes_all_of_them() -> None:
    for check in checks(ODEPairs(), tiny_teacher(), 9):
        check()


def test_half_precision_is_refused_with_the_way_out() -> None:
    teacher = tiny_teacher()
    teacher.family.backbone.to(torch.bfloat16)
    with pytest.raises(UserError, match="mixed_precision='bf16'"):
        check_precision(teacher)


def test_each_refusal_is_raised_by_exactly_its_own_check() -> None:
    """The flow teacher has no bottleneck: of all checks one refuses DMD2 with a GAN."""
    said = []
    for check in checks(DMD2(gan_weight=0.1), flow_teacher(), 9):
        try:
            check()
        except UserError as error:
            said.append(str(error))
    assert len(said) == len(set(said)) == 1


def test_a_folder_is_used_once_or_resumed(tmp_path: Path) -> None:
    fresh = Config(output_dir=tmp_path)
    check_folder(fresh)
    with pytest.raises(UserError, match="nothing to resume"):
        check_folder(Config(output_dir=tmp_path, resume=True))
    checkpoint.save(tmp_path / "checkpoints", 10, {}, {"student": {"w": torch.ones(1)}}, keep=1)
    check_folder(Config(output_dir=tmp_path, resume=True))
    with pytest.raises(UserError, match="--resume"):
        check_folder(fresh)


def test_a_student_of_other_times_than_the_exported_scheduler_has_is_refused() -> None:
    class TwoSteps(ODEPairs):
        def levels(self) -> list[int]:
            return [999, 400]

    check_steps(ODEPairs(), tiny_teacher())
    with pytest.raises(UserError, match=r"\[999, 400\]"):
        check_steps(TwoSteps(), tiny_teacher())
