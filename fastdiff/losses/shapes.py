"""Per-sample numbers against tensors [B, ...]: axes are matched from the left, never from the right."""

import torch
from torch import Tensor


def from_left(x: Tensor, like: Tensor) -> Tensor:
    """``x`` [B] or [B, 1, ...] with trailing axes added until it has as many as ``like``."""
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def coefficient(x: Tensor | float, like: Tensor) -> Tensor:
    """``x`` (a number, [B] or [B, 1, ...]) in the dtype and on the device of ``like``, ready to multiply it."""
    return from_left(torch.as_tensor(x).to(like), like)


def rows(x: Tensor) -> Tensor:
    """``x`` [B, ...] as [B, n]."""
    return x.reshape(len(x), -1)
