"""Hyper-SD: trajectory consistency in ever fewer, ever longer segments, as one adapter for one to eight steps.

    stages  k = 8 -> 4 -> 2 -> 1 segments (``_segments``); each begins from the averaged student of the one before, its teacher
    x_u     = DDIM step from x_t by the stage's teacher: first the guided teacher, then that student, which has the guidance in it
    L_k     = mean | Psi(x_t, t_end) - sg Psi-(x_u, t_end) |^2,    t_end ~ U{t_b .. t_{n-1}}
            + G for k <= 2, the adversarial term of ``_jump_gan``, of rising weight
    then, if asked for, feedback learning (``_feedback``) and score distillation of the one-step sample (``_one_step``)

Trained: a LoRA of rank r and alpha r on the layers of ``lcm_lora``; the target Psi- is its average. Both, and the previous
stage's student, are adapters on the teacher's own network. Delivered: the merged pipeline and the adapter alone, with TCDScheduler;
one adapter for every number of steps (the paper also trains one for each). Every stage starts with a new optimiser.
Ren et al., Hyper-SD: Trajectory Segmented Consistency Model (NeurIPS 2024), arXiv 2404.13686. Its text was read, no training code
is public. Departures: x0 is the teacher's own stored result, not an image; one fixed guidance, and none by later stages' teachers
(the sheet leaves it open); an average of factors, not of the product; no noise on the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.pipelines.lora import export_adapter
from fastdiff.trainers._counts import total
from fastdiff.trainers._feedback import FEEDBACK, FeedbackLearned
from fastdiff.trainers._jump_gan import DISCRIMINATOR, JumpDiscriminated
from fastdiff.trainers._one_step import FAKE_SCORE, ONE_STEP, OneStepDistilled
from fastdiff.trainers.lcm_lora import adapter_role
from fastdiff.trainers.method import Batch, Calls, Delivered, Finished, Paper, Trial, due

_TRIAL = {
    "guidance_scale": 1.0,
    "original_steps": 40,
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "lr": 5e-4,
    "stage_steps": 800,
    "gan_weight": 0.0,
}


@dataclass(frozen=True)
class Stage:
    """What iterations in a row do: in how many segments, how many of them."""

    kind: str
    segments: int
    steps: int


@dataclass(kw_only=True)
class HyperSD(OneStepDistilled, FeedbackLearned, JumpDiscriminated):
    """One adapter for 1 to 8 steps, by trajectory consistency in 8, 4, 2 and 1 segments; needs prompts only."""

    info: ClassVar[Paper] = Paper(
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        venue="NeurIPS",
        year=2024,
        arxiv="2404.13686",
        sheet="few_step_diffusion.md: Hyper-SD",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields={**_TRIAL, "steps": 2}, bounds={"sliced_w2": 0.16, "stray": 0.15}, max_steps=3200),
        "gaussian": Trial(
            fields={**_TRIAL, "eta": 0.0, "steps": 2, "stage_teacher": "first"},
            bounds={"flow_map": 0.16, "w2": 0.7, "axes": 0.9},
            max_steps=3200,
        ),
    }

    segments: tuple[int, ...] = (8, 4, 2, 1)
    """k of each stage, falling."""
    stage_steps: int = 250
    """Iterations of a stage. The run must be long enough for all of them."""
    guidance_scale: float = 7.5
    """Guidance of the teacher in the first stage, which the student then has in itself; 1 is off."""
    decay: float = 0.95
    """Of the target's average: the share of itself that it keeps at each update."""
    stage_teacher: Literal["previous", "first"] = "previous"
    """Whose step x_u is made by in all stages but the first: the previous stage's student's, or still the guided teacher's."""
    distance: Literal["pseudo_huber", "squared"] = "squared"
    """Between prediction and target, element by element."""
    gan_segments: int = 2
    """Stages of so many segments or fewer have the adversarial term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = all(a > b for a, b in zip(self.segments, self.segments[1:], strict=False))
        if not self.segments or not falling or self.segments[-1] < 1 or self.segments[0] > self.original_steps:
            raise UserError(
                f"segments is {self.segments}: expected falling numbers from at most {self.original_steps} to at least 1."
            )
        if self.stage_teacher not in {"previous", "first"}:
            raise UserError(f"stage_teacher is {self.stage_teacher!r}: expected previous or first.")
        for name in ("stage_steps", "guidance_scale", "rank"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if not 0 <= self.decay < 1:
            raise UserError(f"decay is {self.decay}: it must be in [0, 1); at 1 the target would stay the teacher.")

    @classmethod
    def name(cls) -> str:
        return "hyper-sd"

    # --- stages

    def stages(self) -> list[Stage]:
        """All of them, in order; the last one goes on for as long as the run does."""
        found = [Stage("segments", k, self.stage_steps) for k in self.segments]
        further = {FEEDBACK: self.feedback_steps, ONE_STEP: self.one_step_steps}
        return found + [Stage(kind, self.segments[-1], steps) for kind, steps in further.items() if steps]

    def place(self, step: int) -> tuple[int, int]:
        """The stage of an iteration, from 0, and how many iterations of it came before."""
        stages = self.stages()
        for i, stage in enumerate(stages[:-1]):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        return len(stages) - 1, step

    def segments_at(self, step: int) -> int:
        return self.stages()[self.place(step)[0]].segments

    def discriminates(self) -> bool:
        return super().discriminates() and min(self.segments) <= self.gan_segments

    def gan_weight_at(self, step: int) -> float:
        """w, rising linearly over all iterations whose stages have the term."""
        stages = [i for i, k in enumerate(self.segments) if k <= self.gan_segments]
        return self.gan_weight * min((step + 1 - stages[0] * self.stage_steps) / (len(stages) * self.stage_steps), 1.0)

    def check_length(self, max_steps: int) -> None:
        needed = sum(stage.steps for stage in self.stages())
        if max_steps < needed:
            raise UserError(
                f"max_steps is {max_steps}, and {len(self.stages())} stages need {needed}: the last of them would be cut off, and "
                f"the student not one of {self.segments[-1]} segments. Give max_steps={needed}, or smaller stage_steps."
            )

    def restarts(self, step: int) -> tuple[str, ...]:
        i, into = self.place(step)
        first = self.one_step_warmup if self.stages()[i].kind == ONE_STEP else 0
        return ("student",) if step > 0 and into == first else ()

    def begin(self, step: int, roles: Roles) -> None:
        if step == 0 or self.restarts(step):
            for name in ("previous", "target"):
                roles.follow(name, "student", 0.0)

    # --- roles and updates

    def roles(self) -> dict[str, Role]:
        averages = {name: adapter_role(self.rank, follows=True) for name in ("target", "previous")}
        return {"student": adapter_role(self.rank, self.lr), **averages, **self.gan_roles(), **self.one_step_roles()}

    def updates(self, step: int) -> tuple[str, ...]:
        i, into = self.place(step)
        if (kind := self.stages()[i].kind) == ONE_STEP:
            return (FAKE_SCORE,) if into < self.one_step_warmup else (ONE_STEP, FAKE_SCORE)
        if kind == FEEDBACK:
            return (FEEDBACK,)
        gan = self.discriminates() and self.segments_at(step) <= self.gan_segments
        later = i > 0 and self.stage_teacher == "previous"
        update = f"{'later' if later else 'first'}_{'gan' if gan else 'stage'}"
        return (update, DISCRIMINATOR) if gan and due(step, (1, 2)) else (update,)

    def trains(self, update: str) -> tuple[str, ...]:
        return (update,) if update in {DISCRIMINATOR, FAKE_SCORE} else ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        found = total((self._calls_of(update), 1) for update in updates)
        return total([(found, 1), ({"student": Calls(1, 0)}, 1)]) if updates == (FAKE_SCORE,) else found

    def _calls_of(self, update: str) -> dict[str, Calls]:
        if update == DISCRIMINATOR:
            return {"teacher": Calls(2, 0), DISCRIMINATOR: Calls(2, 2)}
        if update == FAKE_SCORE:
            return {FAKE_SCORE: Calls(1, 1)}
        guided, first = Calls(1 if self.guidance_scale == 1 else 2, 0), update.startswith("first")
        if update == ONE_STEP:
            previous = Calls(1 + self.multistep, 0)
            return {"student": Calls(2, 2), "teacher": guided, FAKE_SCORE: Calls(1, 0), "previous": previous}
        if update == FEEDBACK:
            return {"student": Calls(self.steps + 2, 2), "previous": Calls(2, 0)}
        taught = {"teacher": guided} if first else {"previous": Calls(1, 0)}
        found = {"student": Calls(1, 1), "target": Calls(1, 0), **taught}
        looked = Calls(1, 1)
        return total([(found, 1), ({"teacher": looked, DISCRIMINATOR: looked}, 1)]) if update.endswith("gan") else found

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == DISCRIMINATOR:
            return {"discriminator": self.discriminator_term(batch, roles)}
        if update == FAKE_SCORE:
            return {"fake_score": self.fake_score_term(batch, roles)}

        further = {ONE_STEP: self.one_step_terms, FEEDBACK: self.feedback_terms}
        if update in further:
            return {"kept": self.kept(batch, roles), **further[update](batch, roles)}

        def teach(x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
            if update.startswith("first"):
                return roles.denoiser("teacher").guided(x_t, t, cond, batch.null, self.guidance_scale)
            return roles.denoiser("previous")(x_t, t, cond)

        pair = self.pair(batch, roles, teach, target="target")
        terms = {"consistency": self.distance_of(pair)}
        if update.endswith("gan"):
            terms["gan"] = self.generator_term(pair, batch, roles, self.gan_weight_at(batch.draws.key[2]))
        return terms

    def after(self, update: str, roles: Roles) -> None:
        if self.trains(update) == ("student",):
            roles.follow("target", "student", self.decay)

    def signals(self, terms: Mapping[str, float]) -> dict[str, float]:
        told = {"discriminator_loss": terms["discriminator"]} if "discriminator" in terms else {}
        return told | self.drift_signal(terms)

    def deliver(self, finished: Finished) -> Delivered:
        """The merged pipeline, and the adapter beside it."""
        delivered = super().deliver(finished)
        if finished.teacher.pipeline is not None:
            call = self.schedule(finished.teacher).call
            options: dict[str, Any] = {"scheduler": "TCDScheduler", "call": call, "prompt": finished.prompts[0]}
            export_adapter(finished.teacher.pipeline, finished.adapter, finished.folder, **options)
        return delivered
