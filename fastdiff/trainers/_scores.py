"""What the score-distillation methods share: a fake score that may go ahead, its loss under any process, full precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, ContinuousVP, DiscreteVP, expand
from fastdiff.errors import UserError
from fastdiff.losses import denoising
from fastdiff.losses.weights import edm_weight
from fastdiff.models.roles import Roles
from fastdiff.trainers.method import Batch, Method, one_step


@dataclass(kw_only=True)
class FakeScored(Method):
    """A method whose ``student`` follows the difference between the teacher and a ``fake_score`` of its own samples."""

    fake_score_warmup: int = 0
    """First train the fake score alone for so many iterations (0: not at all, as in the papers). It begins as the teacher, which
    is the score of a student that begins so too; any other student would at first be led away from what it has learnt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fake_score_warmup < 0:
            raise UserError(f"fake_score_warmup is {self.fake_score_warmup}: it must not be negative; 0 turns it off.")

    def after_warmup(self, updates: tuple[str, ...], step: int) -> tuple[str, ...]:
        """``updates`` without the student's while the fake score goes ahead; ``step`` 0 is its first."""
        return tuple(u for u in updates if u != "student") if step < self.fake_score_warmup else updates


def generated(batch: Batch, roles: Roles) -> Tensor:
    """The student's one-step samples of this batch without their graph: those of its own update, if that came before."""
    if "x" not in batch.memo:
        with torch.no_grad():
            batch.memo["x"] = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
    x: Tensor = batch.memo["x"]
    return x


def score_matching(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching with the weight that is usual under the process, elementwise [B, ...].

    Variance preserving: the error of eps (DMD2, SwiftBrush), for teachers that predict v too. EDM: that of x0 with EDM's weight
    (DMD2 on ImageNet). Rectified flow and TrigFlow: that of the velocity ``a' x0 + s' eps``.
    """
    process, t = prediction.process, prediction.t
    if isinstance(process, DiscreteVP | ContinuousVP):
        return denoising(prediction.eps, eps)
    if isinstance(process, EDM):
        weight = edm_weight(process.alpha(t), process.sigma(t), sigma_data=process.sigma_data)
        return denoising(prediction.x0, x0, weight=weight)
    velocity = expand(process.dalpha(t), x0) * x0 + expand(process.dsigma(t), x0) * eps
    return denoising(prediction.velocity, velocity)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off where ``like`` is, for small differences of network outputs; the meta device knows no autocast."""
    return nullcontext() if like.device.type == "meta" else torch.autocast(like.device.type, enabled=False)
