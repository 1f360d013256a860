"""SNOOPI's PG-SB: SwiftBrush under a guidance that is drawn anew in every iteration.

    kappa   ~ U(0.5, 4), once an iteration, the same for teacher and fake score
    e~      = (1 - kappa) e(x_t, t, null) + kappa e(x_t, t, y)
    student:     SwiftBrush's with G = s_t^2 ( e~_real - e~_fake )  (+ the clamped CLIP term of SwiftBrush v2, tau = 0.37)
    fake score:  SwiftBrush's, LoRA of rank 64 and alpha 128

A kappa below 1, between the unconditional and the conditional prediction, is allowed and meant. kappa is a choice of the iteration,
equal on all ranks. Its range is (0.5, 4) for Stable Diffusion and (0.5, 3) for PixArt. The range (1, 1) is unguided
variational score distillation. The CLIP term is off unless it is asked for (paper: weight 0.1 to 0). NASA, the paper's negative
prompts at inference, is no part of a training. Nguyen et al., ICCV 2025, arXiv 2412.02687.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastdiff.errors import UserError
from fastdiff.trainers._reward import RewardedMethod
from fastdiff.trainers.method import Batch, Paper, Trial

_TRIAL = {"guidance_range": (1.0, 1.0), "lr": 2e-4, "fake_score_lr": 2e-3}


@dataclass(kw_only=True)
class SNOOPI(RewardedMethod):
    """SwiftBrush with a random guidance that teacher and fake score share (PG-SB)."""

    info: ClassVar[Paper] = Paper(
        title="SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance",
        venue="ICCV",
        year=2025,
        arxiv="2412.02687",
        sheet="few_step_diffusion.md: SNOOPI (PG-SB + NASA)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.45, "stray": 0.35}, max_steps=4000),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.9, "covariance": 0.15}, max_steps=4000),
    }

    guidance_range: tuple[float, float] = (0.5, 4.0)
    """Between which guidances kappa is drawn; (1, 1) is off."""
    lora_alpha: float = 128.0
    """LoRA alpha of the fake score."""
    clip_weight: float = 0.0
    """Weight of the CLIP term at its start (paper: 0.1); 0 turns it off."""
    clip_threshold: float = 0.37
    """tau: a cosine from which on an image is left alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise UserError(f"guidance_range is {self.guidance_range}: it must rise from 0 or more; below 0 it would repel.")

    def guided(self) -> bool:
        return tuple(self.guidance_range) != (1.0, 1.0)

    def scale(self, batch: Batch) -> float:
        low, high = self.guidance_range
        return low + (high - low) * batch.draws.choice("kappa")
