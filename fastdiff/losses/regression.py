"""Distances of a prediction to a target it should repeat."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import rows


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``(prediction - target)^2``, elementwise [B, ...]."""
    return (widened(prediction) - widened(target)).square()


def pseudo_huber(prediction: Tensor, target: Tensor, *, c: float) -> Tensor:
    """``sqrt((prediction - target)^2 + c^2) - c``, elementwise [B, ...]: square below c > 0, absolute value above.

    Its gradient ``d / sqrt(d^2 + c^2)`` tends to ``d / c`` as c grows and to ``sign(d)`` as c vanishes.
    """
    return (squared_error(prediction, target) + c**2).sqrt() - c


def pseudo_huber_norm(prediction: Tensor, target: Tensor, *, c: float) -> Tensor:
    """``sqrt(|prediction - target|^2 + c^2) - c`` [B], the norm over all but the batch dimension.

    Per sample where ``pseudo_huber`` is per element: the same kink needs a c sqrt(n) times as large. ``c = 0`` is the plain
    norm, with gradient 0 (not NaN) where the two agree.
    """
    difference = rows(widened(prediction) - widened(target))
    distance: Tensor = torch.linalg.vector_norm(pad(difference, (0, 1), value=c), dim=1)  # c as one more element
    return distance - c


def huber_constant(n: int) -> float:
    """``0.00054 sqrt(n)``: iCT's c for ``pseudo_huber_norm`` of samples of n elements (recalled, not read in the paper)."""
    return 0.00054 * math.sqrt(n)
