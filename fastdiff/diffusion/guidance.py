"""Classifier-free guidance in the one convention of this library.

``p = p_u + s (p_c - p_u)``: s = 1 is off, s = 0 unconditional (Ho & Salimans, arXiv 2207.12598, with s = 1 + w).
"""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``uncond + scale (cond - uncond)``; scale is a number or broadcasts over the tensors."""
    return uncond + scale * (cond - uncond)


def scale_from_w(w: float) -> float:
    """Our scale of the LCM / Ho & Salimans weight ``w`` of ``p_c + w (p_c - p_u)``."""
    return w + 1
