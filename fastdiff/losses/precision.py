"""Losses are computed in float32 or better: half-precision inputs are widened, float64 stays."""

from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is narrower, else as it is."""
    return x if x.itemsize >= 4 else x.float()
