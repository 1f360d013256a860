"""Guidance in the one convention of this library: ``p = p_u + s (p_c - p_u)``, s = 1 is off, s = 0 unconditional.

Every rule is ``rule(cond, uncond, scale, *, options) -> Tensor`` on predictions [B, ...] of one parametrisation, its scale a
number or one a sample [B], its statistics over all dimensions but the batch. Plain guidance is affine with coefficients that sum
to one, so it commutes with every conversion of ``prediction``. The others do not: each names the parametrisation it is meant for.

Ho & Salimans (arXiv 2207.12598; their w is s - 1), rescaling (WACV 2024, arXiv 2305.08891), intervals (NeurIPS 2024, arXiv
2404.07724), autoguidance (NeurIPS 2024, arXiv 2406.02507), APG (ICLR 2025, arXiv 2410.02416), CFG-Zero* (arXiv 2503.18886),
TCFG (CVPR 2025, arXiv 2503.18137), CFG++ (ICLR 2025, arXiv 2406.08070).
"""

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import expand

Scale = float | Tensor


def guide(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor:
    """``uncond + scale (cond - uncond)``; ``cond`` itself, bit for bit, wherever the scale is 1.

    ``scale`` is a number, one a sample [B], or a tensor of more dimensions that broadcasts.
    """
    scale = _shaped(scale, cond)
    if not isinstance(scale, Tensor):
        return cond if scale == 1 else uncond + scale * (cond - uncond)
    return torch.where(scale == 1, cond, uncond + scale * (cond - uncond))


def scale_from_w(w: float) -> float:
    """Our scale of the LCM / Ho & Salimans weight ``w`` of ``p_c + w (p_c - p_u)``."""
    return w + 1


def w_from_scale(scale: float) -> float:
    """The weight ``w`` that LCM students are conditioned on for our scale."""
    return scale - 1


def scale_from_diffusers(guidance_scale: float) -> float:
    """Our scale of a diffusers pipeline's ``guidance_scale``: equal, but a pipeline guides only above 1, so 0 means off too."""
    return max(guidance_scale, 1.0)


def interval(scale: Scale, t: Tensor, low: float, high: float) -> Tensor:
    """The scale used at times ``t`` [B]: ``scale`` in (low, high], else 1. float64."""
    return torch.where((t > low) & (t <= high), torch.as_tensor(scale, dtype=torch.float64, device=t.device), 1.0)


def rescale(guided: Tensor, cond: Tensor, factor: float) -> Tensor:
    """``factor`` of the way from ``guided`` to itself at the standard deviation of ``cond``."""
    ratio = _wide(cond).std(1) / _wide(guided).std(1)
    return guided * expand(1 + factor * (ratio - 1), guided)


def rescaled(cond: Tensor, uncond: Tensor, scale: Scale, *, factor: float) -> Tensor:
    """Plain guidance, then ``rescale``, against overexposure. Meant for the network's own output; 0.7 is usual (recalled)."""
    return rescale(guide(cond, uncond, scale), cond, factor)


def autoguidance(cond: Tensor, weak: Tensor, scale: Scale) -> Tensor:
    """Plain guidance away from what a ``weak`` model (smaller, less trained) says under the same condition."""
    return guide(cond, weak, scale)


def apg_difference(cond: Tensor, uncond: Tensor, previous: Tensor | None, momentum: float) -> Tensor:
    """``m = (cond - uncond) + momentum m_previous``, the state of ``apg`` from step to step; None at the first."""
    difference = cond - uncond
    return difference if previous is None else difference + momentum * previous


def apg(
    cond: Tensor,
    uncond: Tensor,
    scale: Scale,
    *,
    eta: float = 0.0,
    radius: float | None = None,
    difference: Tensor | None = None,
) -> Tensor:
    """Adaptive projected guidance: ``cond + (scale - 1) (d_perp + eta d_par)``, d = cond - uncond split along cond.

    Meant for x0 (recalled). The base is cond, as in the paper, so that s = 1 is off; diffusers' guider has this with
    ``use_original_formulation=True`` and the scale s - 1, and by default adds s times the split difference to uncond.

    Args:
        eta: weight of the part parallel to cond, which saturates; 1 is plain guidance.
        radius: d is shortened to this norm where it is longer.
        difference: ``apg_difference`` in place of d, for momentum (negative in the paper, recalled).
    """
    d = cond - uncond if difference is None else difference
    if radius is not None:
        d = d * expand((radius / _dot(d, d).sqrt()).clamp(max=1), d)
    along = _dot(d, cond) / _dot(cond, cond).clamp(min=1e-24)
    update = d - expand((1 - eta) * along, d) * cond
    return cond + (_shaped(scale, cond) - 1) * update


def cfg_zero_star(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor:
    """CFG-Zero*: guidance away from ``<cond, uncond> / |uncond|^2 uncond``, the multiple nearest to cond. For flow velocities."""
    nearest = _dot(cond, uncond) / (_dot(uncond, uncond) + 1e-8)
    return guide(cond, expand(nearest, uncond) * uncond, scale)


def zero_init(velocity: Tensor, step: int, num_zero_steps: int = 1) -> Tensor:
    """CFG-Zero*'s other half: no velocity in the first steps (counted from 0), where an undertrained model does harm."""
    return torch.zeros_like(velocity) if step < num_zero_steps else velocity


def tcfg(cond: Tensor, uncond: Tensor, scale: Scale) -> Tensor:
    """Tangential guidance: away from ``uncond`` without its part on the second right-singular vector of [cond; uncond].

    With the top left-singular vector (cos p, sin p), what is left of it is ``sin p (cos p cond + sin p uncond)``.
    """
    cc, uu, cu = _dot(cond, cond), _dot(uncond, uncond), _dot(cond, uncond)
    gap = torch.hypot(cc - uu, 2 * cu).clamp(min=1e-24)
    left = expand(cu / gap, cond) * cond + expand((1 - (cc - uu) / gap) / 2, uncond) * uncond
    return guide(cond, left, scale)


def cfg_plus_plus_step(cond: Prediction, uncond: Prediction, u: Tensor | None, scale: Scale) -> Tensor:
    """DDIM with the guided x0 and the **unconditional** eps; scale in [0, 1] (recalled).

    The one rule without an off: it is plain guidance of the varying scale ``scale / (1 - r_u / r_t)`` (derived).
    """
    x0 = guide(cond.x0, uncond.x0, scale)
    if u is None:
        return x0
    return expand(cond.process.alpha(u), x0) * x0 + expand(cond.process.sigma(u), x0) * uncond.eps


def _shaped(scale: Scale, like: Tensor) -> Scale:
    """One a sample [B] as [B, 1, ...]; numbers and tensors that broadcast already as they are."""
    if not isinstance(scale, Tensor):
        return scale
    return expand(scale, like) if scale.ndim < 2 else scale.to(like)


def _wide(x: Tensor) -> Tensor:
    """[B, n] in float32 or better."""
    return (x.float() if x.itemsize < 4 else x).flatten(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [B]."""
    return (_wide(x) * _wide(y)).sum(1)
