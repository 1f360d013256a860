"""The clamped CLIP term of SwiftBrush v2, which SNOOPI takes over: variational score distillation that also looks at the text.

    L = w(step) mean max(0, tau - cos( E_img(Dec(f)), E_txt(y) ))           w from ``clip_weight`` to 0

An image that fits its prompt by tau or better has no gradient: the term cannot drive the cosine up for its own sake. The decay is
linear, over ``clip_decay_steps`` iterations after the warm start (shape and length are this library's choices; the papers say
0.1 to 0). SwiftBrush v2, ECCV 2024, arXiv 2408.14176; SNOOPI, ICCV 2025, arXiv 2412.02687.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.losses import reduce
from fastdiff.models.clip import BUNDLED_CLIP, load_clip
from fastdiff.models.teacher import BUNDLED, Teacher
from fastdiff.trainers._variational import VariationalMethod
from fastdiff.trainers.method import Batch, Preparation


@dataclass(kw_only=True)
class RewardedMethod(VariationalMethod):
    """A variational method with the clamped CLIP term."""

    clip_weight: float = 0.1
    """Weight of the CLIP term at its start; 0 turns it off."""
    clip_threshold: float = 0.35
    """tau: a cosine from which on an image is left alone."""
    clip_decay_steps: int = 1000
    """Iterations in which the weight falls to 0, linearly, from the first update of the student's by its scores."""
    clip: Any = "fashion"
    """The CLIP: a bundled name, a folder or ``architecture/weights`` of open_clip; or, in Python, any ``(images [B, 3, H, W]
    in [0, 1], texts) -> cosines [B]`` that is differentiable in the images. Its text is part of what a resumed run must share: give
    an object of your own a ``__repr__`` that stays the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_weight < 0:
            raise UserError(f"clip_weight is {self.clip_weight}: it must not be negative; 0 turns the CLIP term off.")
        if not -1 < self.clip_threshold <= 1:
            raise UserError(
                f"clip_threshold is {self.clip_threshold}: a cosine is in (-1, 1], and no image would ever be below it."
            )
        if self.clip_decay_steps < 1:
            raise UserError(f"clip_decay_steps is {self.clip_decay_steps}: it must be at least 1.")

    def validate(self, teacher: Teacher) -> None:
        if self.clip_weight == 0:
            return
        device = teacher.device
        with torch.no_grad():
            shown = teacher.family.decode(torch.zeros(1, *teacher.latent_shape, device=device))
        if shown.ndim != 4 or shown.shape[1] != 3:
            raise UserError(
                f"{teacher.name} decodes to {tuple(shown.shape[1:])}, no RGB picture: a CLIP cannot look at it. Set clip_weight to "
                "0, or pass decode= to Teacher.from_module."
            )
        if self.clip in BUNDLED_CLIP and teacher.name not in BUNDLED:
            raise UserError(
                f"the bundled CLIP knows the pictures of the teacher {self.clip} only, and would send those of {teacher.name} "
                "anywhere. Pass clip, such as ViT-B-32/openai, or set clip_weight to 0."
            )

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        if self.clip_weight > 0:
            self._clip = load_clip(self.clip).to(preparation.teacher.device) if isinstance(self.clip, str) else self.clip

    def clip_weight_at(self, step: int) -> float:
        """w in iteration ``step``."""
        first = self.warm_start_steps + self.fake_score_warmup
        return self.clip_weight * max(0.0, 1 - (step - first) / self.clip_decay_steps)

    def added(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        weight = self.clip_weight_at(batch.draws.key[2])
        if weight == 0:
            return {}
        texts = [batch.prompts.prompts[i] for i in batch.prompt_index.tolist()]
        cosine = self._clip(batch.teacher.family.decode(x), texts)
        return {"clip": weight * reduce((self.clip_threshold - cosine).clamp(min=0))}
