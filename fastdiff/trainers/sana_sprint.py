r"""SANA-Sprint: continuous-time consistency and a GAN on the teacher's features, for one to four steps of one network.

    L_student = 1.0 L_scm + 0.5 mean_k -h_k(x^)                  heads, hinge, noise: ``_adversarial``;   L_scm: ``scm``
    L_scm     = mean [ W(t) e^w(t) (F - sg F - sg N(g))^2 - w(t) ],   W = 1 / (sd tan t)
    x^        = cos t x_t - sd sin t F(x_t / sd, t),   half of the t replaced by pi / 2, where x_t is noise alone
    heads     real x0 against x^ and against real x0 under another prompt, drawn apart (misaligned pairs)

The student is a flow network seen under TrigFlow, exactly (``diffusion.matching``): s = sin t / (sin t + cos t), q^2 = s^2 + (1 -
s)^2, F = [(1 - 2 s) x_s + q^2 u(x_s, s)] / q at x_s = q x_t / sd. It is told the guidance scale that the teacher's velocity has,
drawn for each sample from ``guidance_choices``. Of a SANA teacher it has the dense time embedding too (``models.sprint_network``)
and ends as a stock ``SanaSprintPipeline``; of others it samples as ``scm`` does. W takes the weight from pi / 2, where one-step
sampling starts: there the GAN teaches. Frozen: the teacher. Nothing is trained for a number of steps. Updates without a finite
gradient are skipped by the engine.

SANA-Sprint (ICCV 2025), arXiv 2503.09641, and its released code as the sheet read it. Departures: x0 are the teacher's results, not
images; the student gets the dense embedding by a fit and by ``adaptation_steps`` of regression on the teacher, who keeps its own,
where the paper fine-tunes the teacher; no queries and keys are normed (the bundled teacher's are); RAdam, not CAME; misaligned
pairs are drawn, not rolled, so that a batch may be cut; student and heads take turns in one iteration. Deviation 1 for latents:
means of logarithms are the paper's + ln 2, the same angles.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.guidance import Scale
from fastdiff.diffusion.process import LEVELS, RectifiedFlow, TrigFlow, expand
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.condition import same, with_guidance
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.flow import schedule_of
from fastdiff.pipelines.sprint import flow_time, sprint_schedule, sprint_times
from fastdiff.trainers._adversarial import Adversarial, Fakes
from fastdiff.trainers._tangents import choose_estimator, trigflow_network, under_trigflow
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Trial
from fastdiff.trainers.scm import SCM
from fastdiff.trainers.trajectory import Generators, through

ADAPTATION = "adaptation"
_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "guidance_scale": 1.0,
    "guidance_choices": (),
    "sigma_data": 1.4222,
    "steps": 1,
    "lr": 1e-3,
    "tangent_warmup": 300,
    "jvp": "one-sided",
    "log_mean": -0.1,
    "gan_log_mean": -0.7,
    "gan_log_std": 1.5,
    "discriminator_lr": 2e-3,
}


@dataclass(kw_only=True)
class SanaSprint(Adversarial, SCM):
    """One network for one to four steps, told its guidance scale: consistency keeps the modes, a GAN the detail."""

    info: ClassVar[Paper] = Paper(
        title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
        venue="ICCV",
        year=2025,
        arxiv="2503.09641",
        sheet="few_step_diffusion.md: SANA-Sprint",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring-flow": Trial(
            fields=_TRIAL,
            bounds={"flow_map": 0.25, "sliced_w2": 0.21, "mode_mass": 0.36, "stray": 0.22},
            max_steps=1200,
            law="ring-flow-smooth",
            ema_decay=0.99,
        ),
    }
    papers_warmup: ClassVar[int] = 4000

    guidance_choices: tuple[float, ...] = (4.0, 4.5, 5.0)
    """Scales of the teacher's guidance (1 is off), drawn evenly and told to the student; none: ``guidance_scale``, and it is told
    nothing."""
    guidance_scale: float = 4.5
    """The scale that the student samples at, and the teacher's where none are drawn."""
    pair_guidance_scale: float = 4.5
    """Guidance of the teacher that makes the pairs; 1 is off."""
    log_mean: float = 0.2 + math.log(2)
    """Mean of the logarithm of the noise-to-signal ratio (released configuration: 0.2 on latents of deviation 0.5)."""
    max_time_share: float = 0.5
    """Share of the GAN's samples put at the last time, where one-step sampling begins; drawn at random."""
    extra_weight: Literal["none", "inv_sigma"] = "inv_sigma"
    """``inv_sigma`` multiplies L_scm by 1 / (sd tan t), as the released code does."""
    steps: int = 2
    """Network calls at which the student is exported, with fresh noise between them; the training does not depend on it."""
    scm_weight: float = 1.0
    """Weight of L_scm; 0 leaves the GAN alone."""
    adversarial_weight: float = 0.5
    """Weight of the student's GAN term; 0 turns the discriminator off."""
    misaligned: bool = True
    """Show the discriminator real samples under other prompts as fakes."""
    gan: Literal["softplus", "hinge"] = "hinge"
    """Loss of both players: non-saturating, or the hinge's."""
    gan_log_mean: float = -0.6 + math.log(2)
    """Mean of ln(sigma / alpha) at which the discriminator looks (paper: -0.6 on latents of deviation 0.5)."""
    taps: tuple[float, ...] = (2 / 19, 8 / 19, 14 / 19, 1.0)
    """Which blocks have a head, as shares of the way from the first to the last (paper: 2, 8, 14 and 19 of 0..19)."""
    adaptation_steps: int = 0
    """First regress F on the guided teacher's for so many iterations, until the new embeddings are a part of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            min(self.scm_weight, self.adversarial_weight, self.adaptation_steps) < 0
            or not self.scm_weight + self.adversarial_weight
        ):
            raise UserError(
                f"scm_weight is {self.scm_weight}, adversarial_weight {self.adversarial_weight}, adaptation_steps "
                f"{self.adaptation_steps}: none may be negative, and one of the weights must be above 0."
            )
        choices = self.guidance_choices
        if choices and not (1 <= min(choices) <= self.guidance_scale <= max(choices)):
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, outside guidance_choices {choices}, whose least is 1 (off): the student "
                "would be asked for a scale that it never saw."
            )
        if choices and self.kind == "sct":
            raise UserError(
                "guidance_choices with kind=sct: no teacher is guided, so the student would be told what has no effect."
            )

    @classmethod
    def name(cls) -> str:
        return "sana-sprint"

    # --- roles and counts

    def roles(self) -> dict[str, Role]:
        own = super().roles()
        student = {"student": Role(**{**vars(own["student"]), "build": _told if self.guidance_choices else None})}
        weight = {"weight": own["weight"]} if self.scm_weight else {}
        return student | weight | ({"discriminator": self.discriminator()} if self.adversarial_weight else {})

    def updates(self, step: int) -> tuple[str, ...]:
        if step < self.adaptation_steps:
            return (ADAPTATION,)
        return ("student", "discriminator") if self.adversarial_weight else ("student",)

    def trains(self, update: str) -> tuple[str, ...]:
        if update == "student":
            return ("student", "weight") if self.scm_weight else ("student",)
        return ("student",) if update == ADAPTATION else (update,)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        none, scm = Calls(0, 0), super().calls(updates)
        if ADAPTATION in updates:
            return {"student": Calls(1, 1), "teacher": scm["teacher"]}
        if not self.scm_weight:
            scm = dict.fromkeys(scm, none)
        elif self.guidance_choices:
            scm["teacher"] = Calls(1 if set(self.guidance_choices) == {1} else 2, 0)
        if not self.adversarial_weight:
            return scm
        gan = {"student": Calls(1, 1), **self.gan_calls(1 + self.misaligned)}
        return {name: scm.get(name, none) + gan.get(name, none) for name in (*scm, "discriminator")}

    # --- what is refused, and where the student begins

    def validate(self, teacher: Teacher) -> None:
        if self.adversarial_weight:
            super().validate(teacher)
        else:
            SCM.validate(self, teacher)
        flow = teacher.pipeline is not None and isinstance(teacher.process, RectifiedFlow)
        if flow and not teacher.family.sprint_network():
            raise UserError(
                f"{teacher.name} is a {type(teacher.pipeline).__name__}, and only a SANA student can be saved with SCMScheduler, "
                "at whose times a student of a flow is called here. Take scm."
            )
        if not self.guidance_choices:
            if teacher.family.sprint_network():
                raise UserError(
                    f"guidance_choices is empty, and the stock pipeline of a student of {teacher.name} tells its network a "
                    "guidance scale. Give the one scale that it shall know, such as (4.5,), or (1.0,) for no guidance."
                )
            return
        try:
            _told_network(teacher)
        except NotImplementedError as error:
            raise UserError(
                f"{teacher.name}: {error} Trained at the scales {self.guidance_choices} without knowing which, the student would "
                "learn their mean. Pass guidance_choices=() and one guidance_scale."
            ) from error

    def check_length(self, max_steps: int) -> None:
        if max_steps <= self.adaptation_steps:
            raise UserError(
                f"max_steps is {max_steps}, of which adaptation_steps takes {self.adaptation_steps}: nothing is distilled."
            )

    def prepare(self, preparation: Preparation) -> None:
        Adversarial.prepare(self, preparation)
        estimator = choose_estimator(
            preparation,
            self.jvp,
            under_trigflow(preparation.teacher.process, self.sigma_data),
            single_call=self.single_call,
            backbone=_told(preparation.teacher) if self.guidance_choices else None,
            told=self._told_to_sample,
        )
        self._begin(estimator, preparation.teacher)
        self._grow(preparation)

    # --- the losses

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == ADAPTATION:
            return self._adaptation(batch, roles)
        if update == "discriminator":
            return self._discriminator_loss(batch, roles)
        terms = {}
        if self.scm_weight:
            terms["scm"] = self.scm_weight * super().loss(update, batch, roles)["scm"]
        if self.adversarial_weight:
            x, cond = self.generate(batch, roles)
            batch.memo["fake"] = x.detach()
            terms["gan"] = self.adversarial_weight * self.fooling(x, cond, batch, roles)
        return terms

    def generate(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        """x^ [B, ...] of the module docstring, in the student's own process, and the prompts' conditions."""
        process, (_, x0, cond) = batch.teacher.process, self.draw_pairs(batch, own=True)
        z, end = batch.noise("gan_z"), self.at_end(batch)
        angle = self.angles(batch, "gan_tau")
        t = process.t_from_nsr(TrigFlow(sigma_data=self.sigma_data).nsr(angle))
        last = process.at_level(torch.tensor(LEVELS - 1)).to(t)
        t = torch.where(end.to(t.device), last, t)
        x_t = torch.where(expand(end, z).bool(), process.initial_scale * z, process.add_noise(x0, z, t))
        return roles.denoiser("student")(x_t, t, self.told(cond, batch)).x0, cond

    def _discriminator_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        _, real, cond = self.draw_pairs(batch, own=True)
        fakes: Fakes = {"fake": (batch.memo["fake"], cond, None)}
        if self.misaligned:
            _, other, of_other = self.draw_pairs(batch, own=True, name="misaligned")
            fakes["misaligned"] = other, cond, (~same(cond, of_other)).float()
        return self.judging((real, cond), fakes, batch, roles)

    def _adaptation(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x_t, t, velocity, cond = self._moments(batch, roles)
        network = trigflow_network(roles.denoiser("student"), self.sigma_data, self.told(cond, batch))
        return {"adaptation": reduce(squared_error(network(x_t / self.sigma_data, t), velocity / self.sigma_data))}

    # --- what the losses of ``SCM`` ask

    def iteration(self, batch: Batch) -> int:
        return super().iteration(batch) - self.adaptation_steps

    def scale(self, batch: Batch) -> Scale:
        if not self.guidance_choices:
            return self.guidance_scale
        choices = torch.tensor(self.guidance_choices, dtype=torch.float64)
        index = batch.draws.integers("guidance_scale", 0, len(choices))
        return choices.to(index.device)[index]

    def told(self, cond: Any, batch: Batch) -> Any:
        scale = self.scale(batch)
        return with_guidance(cond, scale) if isinstance(scale, Tensor) else cond

    def drawn_times(self, batch: Batch) -> Tensor:
        return self.angles(batch, "tau")

    # --- sampling

    def _told_to_sample(self, cond: Any) -> Any:
        if not self.guidance_choices:
            return cond
        first = cond
        while isinstance(first, dict):
            first = next(iter(first.values()))
        return with_guidance(cond, torch.full((len(first),), self.guidance_scale, dtype=torch.float64, device=first.device))

    def timesteps(self, teacher: Teacher) -> list[int] | list[float]:
        return sprint_times(self.steps) if isinstance(teacher.process, RectifiedFlow) else super().timesteps(teacher)

    def schedule(self, teacher: Teacher) -> Schedule:
        choices = self.guidance_choices
        told = {"guidance_scale": self.guidance_scale, "guidance_range": (min(choices), max(choices))} if choices else {}
        make: Any = sprint_schedule if teacher.family.sprint_network() else schedule_of
        schedule: Schedule = make(teacher, self.timesteps(teacher), *[] if make is sprint_schedule else [self.sampler], **told)
        return schedule

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        cond = self._told_to_sample(cond)
        if not isinstance(student.process, RectifiedFlow):
            return super().sample(student, noise, cond, generators)
        times = [flow_time(angle) for angle in sprint_times(self.steps)]
        return through(student, noise, cond, times, self.sampler, generators)[-1].x0


def _told_network(teacher: Teacher) -> Any:
    return teacher.family.sprint_network() or teacher.family.guidance_embedding()


def _told(teacher: Teacher) -> nn.Module:
    network: nn.Module = _told_network(teacher)(teacher.family.backbone)
    return network
