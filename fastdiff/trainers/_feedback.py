"""The feedback stage of Hyper-SD: rewards of what the student shows at a late step of its own sampling.

    x_i, t_i   a state of the student's own way from noise, i one of the later half of its steps, one a sample, without a graph
    x0'        = x0(x_i, t_i) of the student
    R          = w_R mean sum_d relu( alpha_d - r_d( Dec(x0'), text ) )             r_d: ``models.rewards``, alpha_d its threshold
    K          = w_K mean | x0' - x0_before(x_i, t_i) |^2                           before: the student that the stage began with

An image whose reward reaches alpha has no gradient, and K keeps the student near what it was: up to a factor it is the KL of
Gaussians around both predictions. A student whose reward still rises while K does is being led to what the reward network likes
beyond good images: above 0.1, a tenth of the variance of latents, the monitor warns (K and its limit are this library's choices;
the paper has the threshold alone). Nor is it the paper's that the one adapter goes on: it trains another LoRA, merged at the end,
with a perceptual loss of instance segmentation too. ``kept`` is in the sum, as in ``_one_step``. Hyper-SD (arXiv 2404.13686).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.rewards import Reward, load_reward
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import BUNDLED, Teacher
from fastdiff.trainers._segments import TrajectoryConsistency
from fastdiff.trainers.method import Batch, Preparation
from fastdiff.trainers.trajectory import trajectory

FEEDBACK = "feedback"


@dataclass(kw_only=True)
class FeedbackLearned(TrajectoryConsistency):
    """A trajectory-consistency method with the feedback stage; the method says when."""

    feedback_steps: int = 0
    """Iterations of feedback learning, after the stages of segments; 0 leaves the stage out."""
    rewards: Any = ("fashion",)
    """A sequence of rewards: names of CLIPs, whose log-probability of the text among the run's prompts they are, or, in Python, a
    ``models.rewards.Reward`` of your own."""
    reward_weight: float = 0.01
    """w_R."""
    drift_weight: float = 1.0
    """w_K."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("feedback_steps", "reward_weight", "drift_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative; 0 turns it off.")
        if self.feedback_steps and not self.rewards:
            raise UserError("feedback_steps asks for feedback, and rewards is empty: give one or more, or feedback_steps=0.")

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        if not self.feedback_steps:
            return
        with torch.no_grad():
            shown = teacher.family.decode(torch.zeros(1, *teacher.latent_shape, device=teacher.device))
        if shown.ndim != 4 or shown.shape[1] != 3:
            raise UserError(
                f"{teacher.name} decodes to {tuple(shown.shape[1:])}, no RGB picture to reward. Set feedback_steps to 0."
            )
        if "fashion" in self.rewards and teacher.name not in BUNDLED:
            raise UserError(
                f"the bundled reward knows the pictures of the bundled teachers only, and would send those of {teacher.name} "
                "anywhere. Pass rewards of your own, or set feedback_steps to 0."
            )

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        wanted = self.rewards if self.feedback_steps else ()
        self._rewards: list[Reward] = [load_reward(source, preparation.prompts.prompts) for source in wanted]

    def feedback_terms(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """R and K."""
        x_i, t = self._late_states(batch, roles)
        prediction = roles.denoiser("student")(x_i, t, batch.cond).x0
        with torch.no_grad():
            before = roles.denoiser("previous")(x_i, t, batch.cond).x0
        texts = [batch.prompts.prompts[i] for i in batch.prompt_index.tolist()]
        images = batch.teacher.family.decode(prediction)
        short = sum((reward.threshold - reward(images, texts)).clamp(min=0) for reward in self._rewards)
        terms = {"reward": self.reward_weight * reduce(torch.as_tensor(short))}
        return terms | {"drift": self.drift_weight * reduce(squared_error(prediction, before))}

    @torch.no_grad()
    def _late_states(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor]:
        """x_i and t_i."""
        levels = torch.tensor(self.levels())
        way = trajectory(
            roles.denoiser("student"),
            batch.noise("z"),
            batch.cond,
            self.levels(),
            "tcd",
            lambda step: batch.noise(f"fresh_{step}"),
            eta=self.eta,
        )
        i = batch.draws.integers("late", len(levels) // 2, len(levels))
        x = torch.stack([moment.x_t for moment in way])[i, torch.arange(len(i), device=i.device)]
        return x, batch.teacher.process.at_level(levels.to(i.device)[i])

    def drift_signal(self, terms: Mapping[str, float]) -> dict[str, float]:
        """K without its weight, for the monitor."""
        return {"drift": terms["drift"] / self.drift_weight} if "drift" in terms and self.drift_weight else {}
