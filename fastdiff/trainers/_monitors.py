"""What goes wrong in score distillation without a bad loss: each a number, its limit, and one line of advice.

    fake_score_lag      mean w |x0_fake - x|^2 over mean w |x0_real - x|^2, w = min(SNR, 1), at noised samples x   above 1.2
    deviation           spread of the samples over the teacher's, about their mean                   below 0.4
    channel_drift       largest shift of a channel's mean, in the teacher's deviations               above 1.5
    saturation          share of decoded values at 0 or 1, above the teacher's share                 above 0.3
    discriminator_loss  softplus(-real) + softplus(fake), 2 log 2 where it cannot tell               below 0.1
    drift               mean squared change of the student's x0 by feedback learning (``_feedback``)  above 0.1
    skipped             share of updates without a finite gradient                                   above 0.05

A fake score that was trained on the student's samples knows them better than the teacher does; where it does not, the difference
of the two scores says nothing. Measured on the validation samples against the teacher's own from the same noise and prompts; the
limits are this library's choice, not a paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.solvers import SOLVERS, trailing_times
from fastdiff.models.condition import repeat
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.method import Method
from fastdiff.trainers.trajectory import own_generators

_ADVICE = {
    "fake_score_lag": (1.2, "the fake score lags behind the student: give it more updates, or a larger fake_score_lr."),
    "channel_drift": (1.5, "a channel drifts to one colour: lower the student's learning rate or the guidance scale."),
    "saturation": (0.3, "pictures saturate: lower the guidance scale."),
    "drift": (0.1, "rewards lead the student away from what it was: lower reward_weight, or raise drift_weight."),
    "skipped": (0.05, "updates have no finite gradient: lower the learning rates, or leave mixed precision."),
}
_LEAST = {
    "deviation": (0.4, "the samples are nearly equal (collapse): lower the student's lr, or train the fake score more."),
    "discriminator_loss": (0.1, "the discriminator tells all samples apart: lower its learning rate, or raise r1_weight."),
}
MONITORS = (*_ADVICE, *_LEAST)


class Monitor:
    """Looks at a run's validation samples; the teacher's own are made at the first look.

    Args:
        prompts, noise: of the validation samples.
    """

    def __init__(self, method: Method, roles: Roles, prompts: list[str], noise: Tensor) -> None:
        self.method, self.roles, self.prompts, self.noise = method, roles, prompts, noise
        self.warnings: dict[str, str] = {}
        """All advice so far, by signal."""
        self._reference: Reference | None = None

    @torch.no_grad()
    def look(self, terms: Mapping[str, float], skipped: float) -> tuple[dict[str, float], list[str]]:
        """The signals now, and the advice that is new.

        Args:
            terms: the latest loss terms.
            skipped: share of updates without a finite gradient.
        """
        roles, teacher = self.roles, self.roles.teacher
        counts = roles.ledger.copy()
        if self._reference is None:
            self._reference = teacher_samples(teacher, self.noise, self.prompts, guidance_scale=self.method.teacher_guidance())
        cond = teacher.encode(self.prompts)
        x = self.method.sample(roles.denoiser("student"), self.noise, cond, own_generators(len(self.noise)))
        signals = {**look(x, teacher.decode(x), self._reference), **self.method.signals(terms), "skipped": skipped}
        if "fake_score" in roles.specs:
            signals["fake_score_lag"] = fake_score_lag(roles, x, cond, torch.Generator().manual_seed(0))
        roles.ledger.clear()
        roles.ledger.update(counts)  # looking is no part of the training
        found = warnings_of(signals)
        new = [text for name, text in found.items() if name not in self.warnings]
        self.warnings |= found
        return signals, new


@dataclass(frozen=True)
class Reference:
    """The teacher's own samples: latents [n, ...] and what they decode to."""

    latents: Tensor
    images: Tensor


def warnings_of(signals: Mapping[str, float]) -> dict[str, str]:
    """Advice by the name of each signal beyond its limit; nan is beyond every limit."""
    high = {name: text for name, (limit, text) in _ADVICE.items() if name in signals and not signals[name] <= limit}
    low = {name: text for name, (limit, text) in _LEAST.items() if name in signals and not signals[name] >= limit}
    return high | low


@torch.no_grad()
def teacher_samples(teacher: Teacher, noise: Tensor, prompts: list[str], *, guidance_scale: float, steps: int = 10) -> Reference:
    """What the teacher makes of the validation noise, by DPM-Solver++(2M)."""
    cond, null = teacher.encode(prompts), repeat(teacher.null, len(noise))
    times = teacher.process.at_level(torch.tensor(trailing_times(LEVELS, steps)))
    x_t = teacher.process.initial_scale * noise
    latents = SOLVERS["dpmpp_2m"](lambda x, t: teacher.denoiser.guided(x, t, cond, null, guidance_scale), x_t, times)
    return Reference(latents, teacher.decode(latents))


def look(latents: Tensor, images: Tensor, reference: Reference) -> dict[str, float]:
    """deviation, channel_drift and saturation of student samples beside the teacher's."""
    own, other = latents.double(), reference.latents.double()
    spread = (other - other.mean(0)).square().mean().sqrt()
    dims = (0, *range(2, own.ndim))
    drift = (own.mean(dims) - other.mean(dims)).abs() / other.std(dims) if own.ndim > 1 else torch.zeros(1)
    return {
        "deviation": ((own - own.mean(0)).square().mean().sqrt() / spread).item(),
        "channel_drift": drift.max().item(),
        "saturation": _saturated(images) - _saturated(reference.images),
    }


@torch.no_grad()
def fake_score_lag(roles: Roles, x: Tensor, cond: Any, generator: torch.Generator) -> float:
    """Denoising error of the fake score over the teacher's, at samples x [n, ...] noised to levels spread over 20..980."""
    process = roles.teacher.process
    t = process.at_level(torch.linspace(20, 980, len(x)).round().long()).to(x.device)
    x_t = process.add_noise(x, torch.randn(x.shape, generator=generator).to(x), t)
    fake, real = (roles.denoiser(name)(x_t, t, cond).x0 for name in ("fake_score", "teacher"))
    weight = process.snr(t).clamp(max=1).to(x.device).reshape(-1, *[1] * (x.ndim - 1))  # the eps error where noise prevails
    return ((weight * (fake - x).square()).mean() / (weight * (real - x).square()).mean()).item()


def _saturated(images: Tensor) -> float:
    return ((images <= 0.002) | (images >= 0.998)).float().mean().item()
