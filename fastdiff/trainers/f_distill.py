"""f-distill: DMD2 whose gradient is weighted by a function of the density ratio that its discriminator estimates.

    r  = clip( exp h(x_t), 0.1, 20 ) / (running mean of the same in the bin of t)        h: DMD2's discriminator, at the x_t of G
    w  = r^2 f''(r):   reverse_kl 1, forward_kl r, jensen_shannon r / (1 + r), squared_hellinger sqrt r, ...
    student:    mean 0.5 ( x - sg[x - (w / mean w) G] )^2 + DMD2's GAN term
    fake score and discriminator: DMD2's

A softplus discriminator's logit is log p_real - log p_fake at its optimum, so any f-divergence of the two laws has DMD2's direction
under such a weight; forward_kl leans on what the student lacks. ``mean w`` is over the global batch: all micro-batches and
ranks. So a first update, ``ratio``, which trains nothing, asks the discriminator about all of them. The running means
(their bins and rate are this library's choices) are a buffer beside the discriminator's head, and a checkpoint has them. Under
reverse_kl the weights are 1, nobody asks for a ratio, and the method is DMD2. Xu, Nie & Vahdat, 2025, arXiv 2502.15681.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.losses import F_DIVERGENCES, f_divergence_weight
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._ranks import over_ranks
from fastdiff.trainers.dmd2 import DMD2
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, one_step

BINS = 10
LOW, HIGH = 0.1, 20.0
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "neyman", "squared_hellinger", "jeffreys"]
_TRIAL = {
    "guidance_scale": 1.0,
    "lr": 1e-3,
    "fake_score_lr": 2e-3,
    "ratio": (1, 2),
    "pairs": 10_000,
    "pair_steps": 32,
    "pair_guidance_scale": 1.0,
    "divergence": "forward_kl",
}


class RatioHead(nn.Module):
    """A discriminator's head with the running mean of exp(logit), clipped, in each bin of levels [bins]."""

    typical: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("typical", torch.ones(BINS))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits

    @torch.no_grad()
    def remember(self, sums: Tensor, counts: Tensor, decay: float) -> None:
        """Move the mean of every bin that got finite ratios towards theirs."""
        means = sums / counts.clamp(min=1)
        moved = torch.lerp(means.to(self.typical), self.typical, decay)
        self.typical.copy_(torch.where((counts > 0) & means.isfinite(), moved, self.typical))


@dataclass(kw_only=True)
class FDistill(DMD2):
    """DMD2 weighted by a density ratio, for any f-divergence; its GAN term is not optional."""

    info: ClassVar[Paper] = Paper(
        title="One-step Diffusion Models with f-Divergence Distribution Matching",
        venue="arXiv",
        year=2025,
        arxiv="2502.15681",
        sheet="few_step_diffusion.md: Diff-Instruct and f-distill",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.4, "stray": 0.25}, max_steps=3500),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.6, "axes": 0.95}, max_steps=3500),
    }
    fixed_point: ClassVar[str] = ""

    divergence: Divergence = "jensen_shannon"
    """Which f-divergence of the teacher's and the student's law goes down."""
    gan_weight: float = 1e-3
    """Weight of the student's GAN term; above 0, for its discriminator estimates the ratio."""
    ratio_decay: float = 0.99
    """What the running means of the ratio keep of themselves in an iteration that updates the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gan_weight > 0:
            raise UserError(
                f"gan_weight is {self.gan_weight}: f-distill estimates its density ratio by the GAN term's discriminator, and "
                "without one its weights would be those of nothing. Give a weight above 0, or train DMD2."
            )
        if self.steps > 1:
            raise UserError(f"steps is {self.steps}: the ratio is estimated for one-step students only, so far.")
        if self.divergence not in F_DIVERGENCES:
            raise UserError(f"divergence is {self.divergence!r}: expected one of {', '.join(F_DIVERGENCES)}.")
        if not 0 <= self.ratio_decay < 1:
            raise UserError(f"ratio_decay is {self.ratio_decay}: it must be in [0, 1).")

    def weighs(self) -> bool:
        """Whether the divergence needs a ratio."""
        return self.divergence != "reverse_kl"

    def roles(self) -> dict[str, Role]:
        roles = super().roles()
        roles["discriminator"] = Role(train="module", lr=self.fake_score_lr, weight_decay=0.01, build=_ratio_head)
        return roles

    def updates(self, step: int) -> tuple[str, ...]:
        updates = super().updates(step)
        return ("ratio", *updates) if self.weighs() and "student" in updates else updates

    def trains(self, update: str) -> tuple[str, ...]:
        return () if update == "ratio" else super().trains(update)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        calls = super().calls(updates)
        if "ratio" in updates:
            calls |= {name: calls[name] + Calls(1, 0) for name in ("student", "fake_score")}
        return calls

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return self._ask_for_ratios(batch, roles) if update == "ratio" else super().loss(update, batch, roles)

    def _ask_for_ratios(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Leaves this micro-batch's weights w [B] in its memo, and adds them and its ratios to what all of them share."""
        x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        t, eps = self.times("student_t", batch), batch.noise("student_eps")
        head = roles.modules["discriminator"]
        logit: Tensor = head(roles.features("fake_score", roles.teacher.process.add_noise(x, eps, t), t, batch.cond))
        low, high = self.noise_range(batch.teacher)["student_t"]
        bins = (batch.draws.integers("student_t", low, high + 1) - low) * BINS // (high + 1 - low)
        typical: Tensor = head.typical  # type: ignore[assignment]
        weight = f_divergence_weight(logit, kind=self.divergence, low=LOW, high=HIGH, typical=typical[bins])
        ratio = logit.double().clamp(math.log(LOW), math.log(HIGH)).exp()
        batch.memo["weight"] = weight
        of_bins = torch.zeros(2, BINS, dtype=torch.float64, device=logit.device)
        of_bins = of_bins.index_add(1, bins, torch.stack([ratio, torch.ones_like(ratio)]))
        own = torch.cat([weight.double().sum()[None], of_bins.flatten()])
        batch.shared["ratios"] = batch.shared.get("ratios", 0) + own
        return {}

    def weighted(self, gradient: Tensor, batch: Batch, roles: Roles) -> Tensor:
        if not self.weighs():
            return gradient
        if "mean_weight" not in batch.shared:
            total = over_ranks(batch.shared["ratios"])
            sums, counts = total[1:].view(2, BINS)
            batch.shared["mean_weight"] = total[0] / counts.sum()
            roles.modules["discriminator"].remember(sums, counts, self.ratio_decay)  # type: ignore[operator]
        return expand(batch.memo["weight"] / batch.shared["mean_weight"], gradient) * gradient


def _ratio_head(teacher: Teacher) -> nn.Module:
    return RatioHead(teacher.family.head())
