"""Scores that stand for human preference: an image and its caption to one number, by a network trained on people's choices.

    s_i = score(image_i, caption_i),   reported as mean and sd / sqrt(N)

Their scales have nothing in common, so each is a column of its own, and a difference means something only between rows of one
score with equal ``conventions``. All run in float32 without autocast and TF32. What they are trained on is their blind spot: an
image model tuned on a score goes up in that score whatever its images look like. ``preferences.py`` lists them by name.

| score | module | scale |
|---|---|---|
| PickScore | ``pickscore.py`` | exp(logit_scale) cosine, about 20 |
| HPSv2 | ``hpsv2.py`` | cosine, about 0.27 |
| ImageReward | ``image_reward.py`` | standardised, mean 0 and sd 1 on its training images |
| LAION aesthetic | ``aesthetic.py`` | a mark from 1 to 10 |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.extractor import no_tf32
from fastdiff.eval.preprocess import checked, pil, quantise
from fastdiff.eval.stats import Score

Conventions = Mapping[str, str | float]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PreferenceValue(Score):
    """A mean preference score, its standard error, and the choices it depends on."""

    conventions: Conventions


class PreferenceScore(ABC):
    """One preference score under fixed conventions.

    Args:
        name: the column of its values.
        network: frozen, put into float32 and on ``device`` here.
        conventions: ``model``, ``text`` (prefix, truncation), ``image`` (resize, crop), ``scale``.

    >>> score = PickScore("PickScore_v1")
    >>> score(images, captions)                              # [N]
    >>> score.score(images, captions)                        # PreferenceValue(value=..., se=..., conventions=...)
    """

    def __init__(self, name: str, network: nn.Module, conventions: Conventions, *, device: str | torch.device = "cpu") -> None:
        self.name, self.conventions = name, dict(conventions)
        self.network: Any = network.eval().float().requires_grad_(False).to(device)

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """``images`` [B, 3, H, W] in [0, 1] as the network takes them, [B, 3, h, w], normalised."""

    @abstractmethod
    def rate(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """Scores [B] of prepared images and their captions, on the device of the network."""

    @torch.inference_mode()
    def __call__(self, images: Tensor, captions: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Scores [N] in float32 on the CPU.

        Args:
            images: [N, 3, H, W] in [0, 1].
            captions: one an image; equal captions of a batch are encoded once.

        Raises:
            UserError: there are no images, or not as many as captions.
            ValueError: an image is not finite or not in [0, 1], or a score is not finite.
        """
        if len(images) != len(captions) or not len(images):
            raise UserError(f"{len(images)} images and {len(captions)} captions: expected one caption an image, and one or more.")
        device = next(self.network.parameters()).device
        self.network.eval()  # a parent's .train() reaches it, and dropout would then move the score
        found = []
        with torch.autocast(device.type, enabled=False), no_tf32():
            for part, texts in zip(images.split(batch_size), _split(captions, batch_size), strict=True):
                found.append(self.rate(self.prepare(checked(part)).to(device), texts).float().cpu())
        scores = torch.cat(found)
        if not scores.isfinite().all():
            bad = (~scores.isfinite()).sum().item()
            raise ValueError(f"{bad} of {len(scores)} {self.name} scores are not finite: the weights are damaged.")
        return scores

    def score(self, images: Tensor, captions: Sequence[str], *, batch_size: int = 64) -> PreferenceValue:
        """Mean of the scores and its standard error sd / sqrt(N); nan for a single image."""
        found = Score.of(self(images, captions, batch_size=batch_size))
        return PreferenceValue(found.value, found.se, self.conventions)


def cosines(image: Tensor, captions: list[str], embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Cosine [B] of image embeddings [B, d] with those of their captions; ``embed`` is called once, on the distinct ones."""
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    text = embed(list(distinct))[[distinct[caption] for caption in captions]]
    return (F.normalize(image, dim=1) * F.normalize(text, dim=1)).sum(dim=1)


def pooled(features: Any) -> Tensor:
    """The tensor [B, d] in what transformers' ``get_image_features`` and ``get_text_features`` give, whichever the release."""
    return getattr(features, "pooler_output", features)


def normalised(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std of images [B, 3, h, w] in [0, 1]."""
    return (images - torch.tensor(mean).to(images)[:, None, None]) / torch.tensor(std).to(images)[:, None, None]


def cropped(images: Tensor, side: int, *, floor: bool = False) -> Tensor:
    """The centre ``side`` x ``side`` after the shorter side is resized to ``side``: PIL's bicubic on 8 bits, in [0, 1].

    Args:
        floor: an odd margin is split as transformers does (smaller half first) instead of torchvision (to the nearest even).
    """
    height, width = images.shape[2:]
    shape = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    levels = quantise(images)
    levels = levels if (height, width) == shape else pil(levels, shape)
    top, left = ((n - side) // 2 if floor else round((n - side) / 2) for n in shape)
    return levels[:, :, top : top + side, left : left + side] / 255


def letterboxed(images: Tensor, side: int) -> Tensor:
    """The whole image in ``side`` x ``side`` between black margins: antialiased bicubic in float, not clipped."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    shape = (round(height * scale), round(width * scale))
    found = quantise(images) / 255
    if shape != (height, width):
        found = F.interpolate(found, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    return F.pad(found, (left, side - shape[1] - left, top, side - shape[0] - top))


def _split(captions: Sequence[str], size: int) -> list[list[str]]:
    return [list(captions[start : start + size]) for start in range(0, len(captions), size)]
