"""Teacher score matching: what its loss is, and that the smaller network it trains is made of the teacher's weights."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.errors import UserError
from fastdiff.models.smaller import smaller
from fastdiff.trainers import TeacherScoreMatching
from fastdiff.trainers.method import Method

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "half": TeacherScoreMatching(width=0.5, **PAIRS),
    "whole-unguided": TeacherScoreMatching(width=1.0, layers=1, pair_guidance_scale=1.0, **PAIRS),
}


def started(folder: Path, prediction_type: str = "epsilon", **fields: object) -> Trainer:
    teacher = tiny_teacher(prediction_type=prediction_type)
    run = Trainer(TeacherScoreMatching(**fields, **PAIRS), teacher, output_dir=folder, max_steps=9, batch_size=4)
    run.start()
    return run


def loss_of(run: Trainer) -> Tensor:
    return run.method.loss("student", run._micro_batches(0)[0], run._roles)["score"]


def test_a_student_of_full_size_is_the_teacher_and_has_zero_loss(tmp_path: Path) -> None:
    run = started(tmp_path, width=1.0)
    assert torch.equal(loss_of(run), torch.tensor(0.0))
    next(iter(run._roles.parameters("student"))).data.mul_(1.1)
    assert loss_of(run) > 1e-6
    run.close()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_the_networks_own_output(prediction_type: str, tmp_path: Path) -> None:
    """Not of x0, whose error would be a^2 / s^2 times that of eps and 1 / s^2 times that of v."""
    run = started(tmp_path, prediction_type)
    batch, method = run._micro_batches(0)[0], run.method
    _, x0, cond = method.draw_pairs(batch)
    t = batch.times("t", 0, 999)
    x_t = run.teacher.process.add_noise(x0, batch.noise("eps"), t)
    with torch.no_grad():
        small, large = run._roles.modules["student"], run.teacher.family.backbone
        outputs = [run.teacher.family.network(network)(x_t, t, cond) for network in (small, large)]
    expected = (outputs[0] - outputs[1]).square().mean()
    assert torch.allclose(loss_of(run), expected, rtol=1e-4)
    run.close()


def test_the_trained_network_is_the_smaller_one_and_the_teacher_is_not_copied(tmp_path: Path) -> None:
    run = started(tmp_path)
    backbone = run.teacher.family.backbone
    ours, theirs = (sum(p.numel() for p in network.parameters()) for network in (run._roles.modules["student"], backbone))
    assert 0.2 < ours / theirs < 0.4
    assert run._roles.modules["student"].config.block_out_channels == [8, 16]
    assert sum(map(torch.numel, run._roles.parameters("student"))) == ours
    run.close()


def test_selected_weights_answer_nearer_to_the_teacher_after_training(tmp_path: Path) -> None:
    """With AdamW at 5e-3, 60 iterations: the loss on one fixed batch falls to less than half."""
    teacher = tiny_teacher()
    run = Trainer(
        TeacherScoreMatching(lr=5e-3, **PAIRS),
        teacher,
        output_dir=tmp_path,
        max_steps=60,
        batch_size=16,
        warmup_steps=0,
        validate_every=0,
    )
    run.start()
    before = loss_of(run).item()
    for _ in range(60):
        run.advance()
    assert loss_of(run).item() < 0.5 * before
    run.close()


@pytest.mark.parametrize("fields", [{"width": 0.0}, {"width": 1.5}, {"layers": 0}])
def test_sizes_that_cannot_be_built_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match="width"):
        TeacherScoreMatching(**fields)
    with pytest.raises(UserError, match="width"):
        smaller(tiny_teacher().family.backbone, **fields)
