"""The adversarial term of a trajectory-consistency student: its jumps against its target's, looked at by the frozen teacher.

    x_s    = renoise( jump at t_end -> s ),  s ~ U{t_end .. the segment's upper edge}            the same s and noise for both
    G      = w(step) mean( -h(x_s of the student) )                                             w rises linearly to ``gan_weight``
    D      = mean relu(1 - h(x_s of the target)) + mean relu(1 + h(x_s of the student))         in every other iteration

h is a small head on the bottleneck features of the frozen teacher's network, which is told s and the prompt: it is conditioned on
time by what it looks through. What counts as real is the target's jump, not data (the sheet's reading of PCM's code), so that no
term contradicts the consistency loss. Recalled or chosen here: one head on the bottleneck, where SDXL-Lightning has several on
encoder and bottleneck; the hinge, PCM's; the shape of w. PCM (NeurIPS 2024, arXiv 2405.18407), Hyper-SD (arXiv 2404.13686).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.renoising import renoise
from fastdiff.errors import UserError
from fastdiff.losses import hinge_discriminator, hinge_generator, reduce
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._latent import Compared
from fastdiff.trainers._scores import full_precision
from fastdiff.trainers._segments import TrajectoryConsistency
from fastdiff.trainers.method import Batch, needs_bottleneck

DISCRIMINATOR = "discriminator"


@dataclass(kw_only=True)
class JumpDiscriminated(TrajectoryConsistency):
    """A trajectory-consistency method with the adversarial term; the method says when."""

    gan_weight: float = 0.1
    """Weight of the adversarial term at the end of its rise (PCM: 0.1); 0 turns it off."""
    discriminator_lr: float = 1e-4
    """Learning rate of the discriminator's head (PCM: 1e-5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_weight < 0:
            raise UserError(f"gan_weight is {self.gan_weight}: it must not be negative; 0 turns the term off.")
        if not self.discriminator_lr > 0:
            raise UserError(f"discriminator_lr is {self.discriminator_lr}: it must be above 0.")

    def discriminates(self) -> bool:
        """Whether any iteration has the term."""
        return self.gan_weight > 0

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        if self.discriminates():
            needs_bottleneck(teacher)

    def gan_roles(self) -> dict[str, Role]:
        """What the term needs besides the student."""
        return {DISCRIMINATOR: Role(train="module", lr=self.discriminator_lr, build=_head)} if self.discriminates() else {}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        own = {"gan_s": (0, LEVELS - 1)} if self.discriminates() else {}
        return {**super().noise_range(teacher), **own}

    def generator_term(self, pair: Compared, batch: Batch, roles: Roles, weight: float) -> Tensor:
        """G; the jumps stay in the batch for D."""
        batch.memo["jumps"] = (pair.prediction.detach(), pair.aim, pair.end, pair.cond)
        return weight * reduce(hinge_generator(self._logits(pair.prediction, pair.end, pair.cond, batch, roles)))

    def discriminator_term(self, batch: Batch, roles: Roles) -> Tensor:
        """D, on the jumps of the student's update before it; the teacher's features have no graph."""
        fake, real, end, cond = batch.memo["jumps"]
        halves = hinge_discriminator(*(self._logits(x, end, cond, batch, roles, train=True) for x in (real, fake)))
        return reduce(halves[0]) + reduce(halves[1])

    def _logits(self, x: Tensor, end: Tensor, cond: Any, batch: Batch, roles: Roles, *, train: bool = False) -> Tensor:
        """h [B] of states at times ``end``, noised to later ones."""
        process, (low, high) = roles.teacher.process, self.segment(batch)
        lower = self.neighbours(batch.draws.integers("n", 0, self.original_steps))[1]
        s = batch.times("gan_s", batch.levels("t_end", low, lower), high)
        x_s = renoise(x, end, s, batch.noise("gan_noise"), process)
        with full_precision(x):  # the discriminator learns from the small difference of two jumps, which bf16 rounds away
            with torch.set_grad_enabled(torch.is_grad_enabled() and not train):
                features = roles.features("teacher", x_s, s, cond)
            return roles.generate(DISCRIMINATOR, features)


def _head(teacher: Teacher) -> nn.Module:
    return teacher.family.head()
