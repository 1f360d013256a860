"""From an unreduced loss to a scalar, with an explicit denominator."""

from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import from_left


def reduce(values: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, denominator: float | None = None) -> Tensor:
    """Weighted sum over everything, divided by ``denominator``.

    Args:
        values: unreduced loss [B, ...].
        mask: bool, broadcastable to values from the left, [B] or [B, 1, ...]; masked-out entries
            count neither in the sum nor in the denominator.
        weight: broadcastable to values from the left, [B] or [B, 1, ...]; multiplies the values, not the denominator.
        denominator: what to divide by; the number of unmasked entries when None, so that the result is a mean.

    Returns:
        float32 (or float64) scalar.

    Raises:
        ValueError: nothing is left under the mask; the mean would be 0 / 0.
    """
    values = widened(values)
    if weight is not None:
        values = values * from_left(weight.to(values), values)
    if mask is not None:
        kept = from_left(mask, values).expand_as(values)
        values = values.where(kept, 0.0)
        count = int(kept.sum())
    else:
        count = values.numel()
    if denominator is None and count == 0:
        raise ValueError("no entry is left under the mask: the mean would be 0 / 0. Skip the batch or pass denominator=.")
    return values.sum() / (count if denominator is None else denominator)
