"""What methods share whose discriminator looks through the frozen teacher: heads on several of its blocks, for noised samples.

    h_k(x, t, y) = head_k( block_k of the teacher's network at (a_t x + s_t eps, t, y) )            k over the tapped blocks
    generator      mean_k g(-h_k(x^))                                softplus: g = softplus;   hinge: g(h) = h
    discriminator  mean_k [ d(-h_k(x)) + d(h_k(x^)) ]                softplus: d = softplus;   hinge: d(h) = relu(1 + h)
    R1             mean_k |d h_k / d features|^2 at real samples, or mean_k (h_k(x_t) - h_k(x_t + 0.1 n))^2
    ln(s_t / a_t) ~ N(m, d^2)                                        under rectified flow a logit-normal t

x are the teacher's stored results. A head is not told the prompt: the backbone has read it. The teacher's weights are frozen, and
the generator's gradient passes through them to its sample; the discriminator's update needs no gradient there. The penalty on
features differentiates the small heads alone, twice. LADD (SIGGRAPH Asia 2024, arXiv 2403.12015), ADD (ECCV 2024, arXiv
2311.17042).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import input_scale
from fastdiff.diffusion.process import NoiseProcess, expand
from fastdiff.errors import UserError
from fastdiff.losses import (
    approximate_gradient_penalty,
    gradient_penalties,
    hinge_discriminator,
    hinge_generator,
    reduce,
    softplus_discriminator,
    softplus_generator,
)
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers._scores import full_precision
from fastdiff.trainers.method import Batch, Calls

_GAMES = {"softplus": (softplus_generator, softplus_discriminator), "hinge": (hinge_generator, hinge_discriminator)}
Logits = list[Tensor]
"""Of each head, [B, N]."""
Fakes = dict[str, tuple[Tensor, Any, Tensor | None]]
"""By name, samples [B, ...] that are to be told apart, their conditions, and which of them [B] count; None is all."""


class Heads(nn.Module):
    """One head a tapped block: feature maps to all logits [B, M], head by head; ``sizes`` are theirs in the latest call."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads, self.sizes = nn.ModuleList(heads), list[int]()

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits = [head(features).reshape(len(features), -1) for head, features in zip(self.heads, maps, strict=True)]
        self.sizes = [logit.shape[1] for logit in logits]
        return torch.cat(logits, dim=1)


@dataclass(kw_only=True)
class Adversarial(StoredPairs):
    """A method whose student is told by heads on the teacher's features what sets its samples apart from stored results."""

    gan: Literal["softplus", "hinge"] = "softplus"
    """Loss of both players: non-saturating, or the hinge's."""
    gan_log_mean: float = 1.0
    """Mean of ln(sigma / alpha) at which the discriminator looks: high for the whole picture, low for texture."""
    gan_log_std: float = 1.0
    """Its deviation."""
    r1: Literal["features", "input"] = "features"
    """Where the penalty on the discriminator's slope at real samples acts: exactly at the features, or estimated at the input."""
    r1_weight: float = 0.0
    """Weight of that penalty; 0 is off. At the features R1's gamma / 2 (ADD: 1e-5), at the input FastGen's (100 to 1000)."""
    taps: tuple[float, ...] = ()
    """Which blocks have a head, as shares of the way from the first to the last; none given is every block."""
    discriminator_lr: float = 1e-4
    """Learning rate of the heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in {"gan": tuple(_GAMES), "r1": ("features", "input")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        if self.r1_weight < 0 or not all(0 <= share <= 1 for share in self.taps):
            raise UserError(
                f"r1_weight is {self.r1_weight}, taps {self.taps}: expected a weight of 0 or more and shares in [0, 1]."
            )
        for name in ("gan_log_std", "discriminator_lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")

    def gan_calls(self, fakes: int = 1) -> dict[str, Calls]:
        """What ``fooling`` and ``judging`` of so many kinds of fakes run; an exact penalty is one more backward of the heads."""
        nudged, exact = (self.r1_weight > 0 and self.r1 == where for where in ("input", "features"))
        judged = 1 + fakes + nudged
        return {"teacher": Calls(1 + judged, 1), "discriminator": Calls(1 + judged, 1 + judged + exact)}

    def discriminator(self) -> Role:
        """The heads; without momentum, as they follow a moving student (the paper's optimiser is not on the sheet)."""
        return Role(train="module", lr=self.discriminator_lr, betas=(0.0, 0.99), build=self._heads)

    def _heads(self, teacher: Teacher) -> nn.Module:
        heads = teacher.family.block_heads()
        return Heads([heads[tap] for tap in self.tapped(teacher)])

    def tapped(self, teacher: Teacher) -> list[int]:
        """Indices of the tapped blocks, rising."""
        n = len(teacher.family.blocks(teacher.family.backbone))
        return sorted({round(share * (n - 1)) for share in self.taps}) if self.taps else list(range(n))

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        try:
            self._heads(teacher)
        except NotImplementedError as error:
            raise UserError(f"{teacher.name}: {error} Name some layers to look at (blocks=), or take another teacher.") from error

    def signals(self, terms: Mapping[str, float]) -> dict[str, float]:
        return {"discriminator_loss": terms["discriminator"]} if "discriminator" in terms else {}

    def maps(self, x: Tensor, draw: str, cond: Any, batch: Batch, roles: Roles, *, nudge: bool = False) -> tuple[list[Tensor], ...]:
        """Features of x [B, ...] noised to a time of its own; with ``nudge`` also of that state with 0.1 of further noise on it."""
        teacher = roles.teacher
        t = log_normal_times(teacher.process, batch.draws.normal(f"{draw}_t", ()), self.gan_log_mean, self.gan_log_std)
        states = [teacher.process.add_noise(x, batch.noise(f"{draw}_eps"), t)]
        if nudge:
            scale = input_scale(teacher.process, t, teacher.prediction_type)
            noise = 0.1 * batch.noise(f"{draw}_nudge")
            states.append(states[0] + (noise if scale is None else noise / expand(scale, noise)))
        return tuple(roles.feature_maps("teacher", self.tapped(teacher), x_t, t, cond) for x_t in states)

    def fooling(self, x: Tensor, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The generator's term, a scalar."""
        generator = _GAMES[self.gan][0]
        (maps,) = self.maps(x, "fool", cond, batch, roles)
        return mean([reduce(generator(logit)) for logit in judged(maps, roles)])

    def judging(self, real: tuple[Tensor, Any], fakes: Fakes, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """The discriminator's terms; several kinds of fakes share the fake half of its loss evenly. Samples get no gradient."""
        discriminator = _GAMES[self.gan][1]
        on_real, penalty = self._on_real(*real, batch, roles)
        total = mean([reduce(discriminator(logit, logit)[0]) for logit in on_real])
        for name, (x, cond, counts) in fakes.items():
            with torch.no_grad():
                (maps,) = self.maps(x, name, cond, batch, roles)
            halves = [reduce(discriminator(logit, logit)[1], weight=counts) for logit in judged(maps, roles)]
            total = total + mean(halves) / len(fakes)
        return {"discriminator": total} if penalty is None else {"discriminator": total, "r1": self.r1_weight * penalty}

    def _on_real(self, x: Tensor, cond: Any, batch: Batch, roles: Roles) -> tuple[Logits, Tensor | None]:
        """Logits at real samples, and R1 there, or its estimate; in full precision where slopes are taken."""
        exact = self.r1 == "features"
        with full_precision(x) if self.r1_weight > 0 else nullcontext():
            with torch.no_grad():
                found = self.maps(x, "real", cond, batch, roles, nudge=self.r1_weight > 0 and not exact)
            if self.r1_weight == 0:
                return judged(found[0], roles), None
            if not exact:
                plain, nudged = (judged(maps, roles) for maps in found)
                return plain, mean([reduce(approximate_gradient_penalty(a, b)) for a, b in zip(plain, nudged, strict=True)])
            maps = [features.detach().requires_grad_() for features in found[0]]
            logits = judged(maps, roles)
            slopes = gradient_penalties([logit.mean(1) for logit in logits], maps)
            return logits, mean([reduce(slope) for slope in slopes])


def judged(maps: list[Tensor], roles: Roles) -> Logits:
    """The heads' logits at feature maps."""
    logits = roles.generate("discriminator", maps)
    heads: Any = roles.modules["discriminator"]
    return list(logits.split(heads.sizes, dim=1))


def log_normal_times(process: NoiseProcess, z: Tensor, mean: float, std: float) -> Tensor:
    """Times [B] whose ``ln(sigma / alpha)`` is ``mean + std z``, clamped to the process's range; whole ones where it has such."""
    t = process.t_from_nsr((mean + std * z.double()).exp())
    return t.clamp(process.t_min, process.t_max).to(t)


def mean(terms: list[Tensor]) -> Tensor:
    """Of scalars, one a head."""
    return torch.stack(terms).mean()
