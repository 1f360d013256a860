r"""Consistency models: f(x_t, t) = x0 for every t of one trajectory, and f(x, t_min) = x by construction.

    f(x, t) = c_skip(t) x + c_out(t) F            the boundary
    CD, CT   d(f(x_t, t), sg f-(x_r, r))          r < t; x_r by one teacher step (CD) or by the same noise (CT)
    iCT, ECT  (sqrt(|f - sg f-|^2 + c^2) - c) / (t - r)       per sample
    LCM      sqrt((f - sg f-)^2 + c^2) - c        per element

The target f- is never differentiated: every loss here stops its gradient, whichever network made it. The perceptual distance of
CD is a network and lives elsewhere.

CM (ICML 2023, arXiv 2303.01469), iCT (ICLR 2024, arXiv 2310.14189; recalled, not read in the paper), ECT (ICLR 2025, arXiv
2406.14548), LCM (2023, arXiv 2310.04378).
"""

from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.regression import huber_constant, pseudo_huber, pseudo_huber_norm, squared_error


def consistency_boundary(sigma: Tensor, *, sigma_data: float = 0.5, sigma_min: float = 0.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of EDM's F, like sigma: (1, 0) exactly at ``sigma_min``.

    ``sd^2 / ((sigma - sigma_min)^2 + sd^2)`` and ``sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2)``: the original CM with
    ``sigma_min=0.002``, plain EDM (as in ECT) with 0. A time rounded to half precision misses ``sigma_min``: keep it in float32.
    """
    sigma = widened(sigma)
    above, variance = sigma - sigma_min, sigma_data**2
    return variance / (above.square() + variance), sigma_data * above / (sigma.square() + variance).sqrt()


def latent_consistency_boundary(t: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out of an **x0 prediction** at DDPM times t, (1, 0) exactly at 0; from t = 1 on nearly (0, 1).

    With s = timestep_scaling t: ``sd^2 / (s^2 + sd^2)`` and ``s / sqrt(s^2 + sd^2)``, which lacks the sd of EDM's c_out.
    """
    scaled, variance = timestep_scaling * widened(t), sigma_data**2
    return variance / (scaled.square() + variance), scaled / (scaled.square() + variance).sqrt()


def consistency(prediction: Tensor, target: Tensor, *, norm: str = "squared") -> Tensor:
    """CD and CT: ``(f - sg f-)^2`` or, with ``norm="absolute"``, ``|f - sg f-|``, elementwise [B, ...].

    Both networks see the same noise and the same dropout mask; another mask is noise in the target, without an error.

    Raises:
        ValueError: another norm.
    """
    if norm == "squared":
        return squared_error(prediction, target.detach())
    if norm == "absolute":
        return (widened(prediction) - widened(target).detach()).abs()
    raise ValueError(f"norm={norm!r}: consistency knows 'squared' and 'absolute'.")


def improved_consistency(prediction: Tensor, target: Tensor, t: Tensor, r: Tensor, *, c: float | None = None) -> Tensor:
    """iCT and ECT: ``(sqrt(|f - sg f-|^2 + c^2) - c) / (t - r)`` [B].

    Args:
        prediction, target: f(x_t, t) and f-(x_r, r) [B, ...]; in ECT x0 where r = 0.
        t, r: noise levels [B], t > r.
        c: ``huber_constant(n)`` when None, as iCT has it; 0 for the norm itself (ECT).

    Raises:
        ValueError: some t is not above r; its weight would be infinite, or would push prediction and target apart.
    """
    if not t.is_meta and bool((t <= r).any()):
        raise ValueError("some t is not above its r: 1 / (t - r) would be infinite or negative. Pass the noisier time first.")
    n = prediction[0].numel()
    distance = pseudo_huber_norm(prediction, target.detach(), c=huber_constant(n) if c is None else c)
    return distance / (t - r).to(distance).reshape(distance.shape)


def latent_consistency(prediction: Tensor, target: Tensor, *, c: float = 1e-3) -> Tensor:
    """LCM: ``sqrt((f - sg f-)^2 + c^2) - c``, elementwise [B, ...]."""
    return pseudo_huber(prediction, target.detach(), c=c)


def easy_consistency_time(t: Tensor, stage: int, *, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """ECT's r = max(0, t (1 - q^-(stage + 1) (1 + k sigmoid(-b t)))), like t.

    At r = 0 it is diffusion training, where early stages start.
    """
    t = widened(t)
    return (t * (1 - q ** -(stage + 1) * (1 + k * (-b * t).sigmoid()))).clamp_min(0.0)
