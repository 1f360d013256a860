r"""sCM: continuous-time consistency, distilled from the teacher (sCD) or learned from the data alone (sCT).

    x_t = cos t x0 + sin t z,   z = sd eps,   tan t = exp(N(log_mean, log_std^2)) / sd          TrigFlow
    v   = dx_t/dt: the guided teacher's (sCD), or cos t z - sin t x0 (sCT)
    F   = the student seen under TrigFlow at the same noise-to-signal ratio;   f = cos t x_t - sd sin t F
    g   = -cos^2 t (sd F - v) - r (cos t sin t x_t + sd J),   J = cos t sin t dF/dt along v,   r = min(1, step / warmup)
    L   = e^w(t) |F - sg F - sg N(g)|^2 / n - w(t),           gradient -2 e^w / n N(g) dF

At r = 1, g = cos t df/dt, zero where f is constant along the teacher's trajectories. J is a directional derivative of the network
(``_tangents``) with cos t sin t inside, so that its inputs stay of order one. Trained: the student, a full copy of the teacher's
network in its own process and prediction type, and w, one linear layer on sines of t. Frozen: the teacher.

Data free: x0 are the teacher's own stored results, where the paper has real data. ``extra_weight`` is of SANA-Sprint's and other
released codes, ``rms`` of FastGen's, ``max_time_share`` of SANA-Sprint. No network of the teacher's is changed: the paper's rules
for embeddings and normalisation are for networks trained from scratch. Lu & Song, ICLR 2025, arXiv 2410.11081.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.guidance import Scale
from fastdiff.diffusion.matching import match_state
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, TrigFlow, expand
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.diffusion.times import trig_log_normal
from fastdiff.errors import UserError
from fastdiff.losses import inverse_sigma_weight, normalise_tangent, premultiplied_tangents, reduce, scm, scm_tangent
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers._tangents import FORWARDS, Estimator, angles, choose_estimator, trigflow_network, under_trigflow
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Prepared, Trial
from fastdiff.trainers.trajectory import Sampler

_CHOICES = {
    "kind": ("scd", "sct"),
    "normalisation": ("norm", "rms", "clip"),
    "extra_weight": ("none", "inv_sigma"),
    "jvp": tuple(FORWARDS),
}
_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "guidance_scale": 1.0,
    "sigma_data": 1.4222,
    "lr": 1e-3,
    "tangent_warmup": 500,
}
_RING = {"flow_map": 0.16, "sliced_w2": 0.14, "mode_mass": 0.26, "mode_spread": 0.2, "stray": 0.12}


class LogWeight(nn.Module):
    """w [B] at TrigFlow times t [B]: one linear layer on ``cos(2^k t)`` and ``sin(2^k t)``, k = 0..7, which starts at w = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        phases = t[:, None] * 2.0 ** torch.arange(8, device=t.device)
        features = torch.cat([phases.cos(), phases.sin()], dim=1)
        weight: Tensor = self.linear(features.to(self.linear.weight.dtype))[:, 0]
        return weight


@dataclass(kw_only=True)
class SCM(StoredPairs):
    """Few-step student by continuous-time consistency; keeps the teacher's mapping from noise to image, without a fake score."""

    info: ClassVar[Paper] = Paper(
        title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        venue="ICLR",
        year=2025,
        arxiv="2410.11081",
        sheet="few_step_diffusion.md: Consistency family (sCM)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields={**_TRIAL, "jvp": "forward", "single_call": True},
            bounds=_RING,
            max_steps=2400,
            law="ring-smooth",
            ema_decay=0.998,
        ),
        "ring-sct": Trial(
            fields={**_TRIAL, "kind": "sct", "jvp": "one-sided"},
            bounds=_RING,
            max_steps=4000,
            law="ring-smooth",
            ema_decay=0.998,
        ),
        "gaussian": Trial(
            fields={**_TRIAL, "sigma_data": 1.0, "jvp": "one-sided"},
            bounds={"flow_map": 0.14, "w2": 0.42, "axes": 0.4},
            max_steps=2000,
            law="gaussian-smooth",
        ),
        "ring-flow": Trial(
            fields=_TRIAL,
            bounds={**_RING, "flow_map": 0.18, "mode_spread": 0.7, "stray": 0.16},
            max_steps=2200,
            law="ring-flow-smooth",
            ema_decay=0.998,
        ),
    }
    sampler: ClassVar[Sampler] = "consistency"
    papers_warmup: ClassVar[int] = 10_000
    """Iterations of the paper's tangent warm-up."""

    kind: Literal["scd", "sct"] = "scd"
    """Whose velocity the student follows: the teacher's (scd) or that from noise to data (sct), which no teacher is asked for."""
    guidance_scale: float = 3.0
    """Guidance of the teacher in sCD; 1 is off. sCT asks no teacher: its data have ``pair_guidance_scale``."""
    sigma_data: float = 1.0
    """Standard deviation of the data, of latents about 1. It sets the scale of F and of the times, and need not be exact."""
    log_mean: float = -0.1
    """Mean of the logarithm of the noise-to-signal ratio (paper: -0.8 on latents of deviation 0.5, the same angles as here)."""
    log_std: float = 1.6
    """Its deviation (paper: 1.4 to 1.6)."""
    max_time_share: float = 0.0
    """Share of the samples put at the last time, where one-step sampling begins (SANA-Sprint: 0.5); drawn at random."""
    tangent_warmup: int | None = None
    """Iterations in which the tangent grows in, from regression of F to v; None is a quarter of the run, at most 10,000 (paper)."""
    normalisation: Literal["norm", "rms", "clip"] = "norm"
    """How a sample's tangent is made of order one: its norm, its root mean square, or bounds of 1 on its elements."""
    c: float = 0.1
    """What norm and rms add to the denominator; beside a norm in many dimensions it vanishes."""
    extra_weight: Literal["none", "inv_sigma"] = "none"
    """``inv_sigma`` multiplies the loss by 1 / (sd tan t), which takes weight from the time of one-step sampling."""
    jvp: Literal["auto", "forward", "central", "one-sided"] = "auto"
    """How the derivative is estimated; ``auto`` measures at the start and takes forward or one-sided."""
    single_call: bool = False
    """Take forward's derivative and the loss from one network call, in the place of two."""
    dropout: bool = False
    """Run the student in train mode, its dropout at work (paper: in sCT); all calls of an update have the same masks."""
    steps: int = 1
    """Network calls of the student, with fresh noise between them."""
    lr: float = 1e-4
    """Learning rate of the student and of w."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        for name in ("sigma_data", "log_std", "c", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")
        if not 0 <= self.max_time_share < 1 or (self.tangent_warmup or 0) < 0:
            raise UserError(
                f"max_time_share is {self.max_time_share}, tangent_warmup {self.tangent_warmup}: "
                "expected a share in [0, 1) and a number of iterations."
            )
        if not 1 <= self.steps <= 50:
            raise UserError(f"steps is {self.steps}: expected 1 to 50.")
        if self.single_call and self.jvp != "forward":
            raise UserError(
                f"single_call with jvp={self.jvp}: only a forward derivative makes the output and the derivative in one call. "
                "Set jvp=forward."
            )

    def roles(self) -> dict[str, Role]:
        options: dict[str, Any] = {"lr": self.lr, "optimizer": "radam", "betas": (0.9, 0.99)}
        return {
            "student": Role(train="full", dropout=self.dropout, **options),
            "weight": Role(train="module", build=lambda teacher: LogWeight(), **options),
        }

    def teacher_guidance(self) -> float:
        return self.guidance_scale if self.kind == "scd" else self.pair_guidance_scale

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student", "weight")

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        asked = 0 if self.kind == "sct" else 1 if self.guidance_scale == 1 else 2
        forwards = 1 if self.single_call else FORWARDS[self.jvp]
        return {"student": Calls(forwards, 1), "weight": Calls(1, 1), "teacher": Calls(asked, 0)}

    def validate(self, teacher: Teacher) -> None:
        if self.single_call and any(
            getattr(module, "gradient_checkpointing", False) for module in teacher.family.backbone.modules()
        ):
            raise UserError(
                f"single_call with {teacher.name}, whose network has gradient checkpointing on: the recomputation knows no "
                "tangents, and torch would raise in the backward. Turn checkpointing off, or single_call off, for a second call."
            )

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        seen = under_trigflow(preparation.teacher.process, self.sigma_data)
        estimator = choose_estimator(preparation, self.jvp, seen, single_call=self.single_call)
        self._begin(estimator, preparation.teacher)
        self._grow(preparation)

    def _grow(self, preparation: Preparation) -> None:
        """Settle the warm-up of a run of this length, if no setting does."""
        if self.tangent_warmup is None:
            self._warmup = min(self.papers_warmup, preparation.max_steps // 4)
            preparation.say(f"the tangent grows in over {self._warmup} iterations (tangent_warmup).")

    def prepare_blank(self, teacher: Teacher, world_size: int) -> Prepared:
        self._begin(Estimator("forward"), teacher)
        return super().prepare_blank(teacher, world_size)

    def _begin(self, estimator: Estimator, teacher: Teacher) -> None:
        self._warmup = self.papers_warmup if self.tangent_warmup is None else self.tangent_warmup
        self._estimator = estimator
        self._range = estimator.within(*angles(teacher.process, self.sigma_data))

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        sd = self.sigma_data
        x_t, t, velocity, cond = self._moments(batch, roles)
        network = trigflow_network(roles.denoiser("student"), sd, self.told(cond, batch))
        primals, tangents = (x_t / sd, t), premultiplied_tangents(velocity, t, sigma_data=sd)
        prediction, frozen, jvp = self._estimator(network, primals, tangents)
        if self.single_call:
            roles.watched("student", prediction)
        warmup = min(1.0, self.iteration(batch) / self._warmup) if self._warmup else 1.0
        g = scm_tangent(x_t, t, frozen, velocity, jvp, sigma_data=sd, warmup=warmup)
        g = normalise_tangent(g, kind=self.normalisation, c=self.c)
        weight = inverse_sigma_weight(t, sigma_data=sd) if self.extra_weight == "inv_sigma" else 1.0
        return {"scm": reduce(scm(prediction, g, log_weight=roles.generate("weight", t), weight=weight))}

    @torch.no_grad()
    def _moments(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, Tensor, Any]:
        """x_t [B, ...], its times t [B] in float64, dx_t/dt there, and the conditions."""
        _, x0, cond = self.draw_pairs(batch, own=True)
        t, z = self.drawn_times(batch), self.sigma_data * batch.noise("eps")
        x_t = expand(t.cos(), x0) * x0 + expand(t.sin(), z) * z
        if self.kind == "sct":
            return x_t, t, expand(t.cos(), z) * z - expand(t.sin(), x0) * x0, cond
        process, teacher = TrigFlow(sigma_data=self.sigma_data), roles.denoiser("teacher").continuous()
        state, time = match_state(x_t, t, process, teacher.process)
        guided = teacher.guided(state, time, cond, batch.null, self.scale(batch))
        return x_t, t, Prediction(x_t, t, guided.x0, process).velocity, cond

    def iteration(self, batch: Batch) -> int:
        """How many iterations of this loss were before."""
        return batch.draws.key[2]

    def scale(self, batch: Batch) -> Scale:
        """Guidance of the teacher: a number, or one a sample [B]."""
        del batch
        return self.guidance_scale

    def told(self, cond: Any, batch: Batch) -> Any:
        """What the student is given of the condition: all of it, and no more."""
        del batch
        return cond

    def drawn_times(self, batch: Batch) -> Tensor:
        """TrigFlow times [B], float64, in the range that the teacher's process reaches."""
        return self.angles(batch, "tau").masked_fill(self.at_end(batch), self._range[1])

    def at_end(self, batch: Batch) -> Tensor:
        """Which samples [B] are put at the last time."""
        return batch.draws.uniform("at_end") < self.max_time_share

    def angles(self, batch: Batch, name: str) -> Tensor:
        """The log-normal times alone."""
        t = trig_log_normal(batch.draws.normal(name, ()).double(), self.log_mean, self.log_std, sigma_data=self.sigma_data)
        return t.clamp(*self._range)
