"""Rewards: what an image is worth for its text, differentiable in the image; what feedback learning pushes a student towards.

>>> reward = CaptionReward(load_clip("fashion"), captions())         # log p(caption | image) among all captions
>>> reward(images, texts)                                           # [B] of images [B, 3, H, W] in [0, 1]

ImageReward, HPSv2, PickScore or an aesthetic predictor fit behind the same ``Reward``; those of ``fastdiff.eval`` do not: they
prepare images as their packages do, in 8 bits and by PIL, where a gradient ends.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastdiff.models.clip import Clip, load_clip


@runtime_checkable
class Reward(Protocol):
    """Images [B, 3, H, W] in [0, 1] and a text for each to rewards [B], differentiable in the images.

    ``threshold`` is the reward from which on an image is left alone: without it the student would go on to whatever the network
    rewards beyond good images. Its ``repr`` is part of what a resumed run must share.
    """

    threshold: float

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor: ...


class CaptionReward:
    """``log p(text | image)`` under a CLIP, the softmax being over ``captions``; at most 0.

    Args:
        captions: the texts that an image could have; those asked about must be among them.
        threshold: alpha; log 0.9 leaves an image alone whose text is given nine tenths.

    Raises:
        KeyError: a text is none of the captions.
    """

    def __init__(self, clip: Clip, captions: Sequence[str], *, threshold: float = -0.105) -> None:
        self.clip, self.threshold = clip, threshold
        self.place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        self._directions = clip.directions(list(self.place))

    def __repr__(self) -> str:
        return f"CaptionReward({self.clip!r}, {len(self.place)} captions, threshold={self.threshold})"

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        cosines = self.clip.features(images) @ self._directions.mT.to(images.device)
        log_p = (self.clip.scale * cosines).log_softmax(dim=1)
        return log_p[torch.arange(len(texts)), [self.place[text] for text in texts]]


def load_reward(source: Any, captions: Sequence[str]) -> Reward:
    """A ``Reward`` as it is, or by the name of a CLIP (``models.clip.load_clip``) the ``CaptionReward`` among ``captions``.

    Raises:
        UserError: there is no CLIP of that name.
        TypeError: it is neither.
    """
    if isinstance(source, str):
        return CaptionReward(load_clip(source), captions)
    if not isinstance(source, Reward):
        raise TypeError(f"{source!r} is no reward: expected a name, or a callable (images, texts) -> [B] with a threshold.")
    return source
