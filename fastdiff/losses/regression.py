"""Distances of a prediction to a target it should repeat."""

from torch import Tensor

from fastdiff.losses.precision import widened


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``(prediction - target)^2``, elementwise [B, ...]."""
    return (widened(prediction) - widened(target)).square()


def pseudo_huber(prediction: Tensor, target: Tensor, *, c: float) -> Tensor:
    """``sqrt((prediction - target)^2 + c^2) - c``, elementwise [B, ...]: square below c > 0, absolute value above.

    Its gradient ``d / sqrt(d^2 + c^2)`` tends to ``d / c`` as c grows and to ``sign(d)`` as c vanishes.
    """
    return (squared_error(prediction, target) + c**2).sqrt() - c
