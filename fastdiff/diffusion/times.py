"""Times to train and to sample at, as pure maps: of standard draws, and grids.

Draws are u uniform in [0, 1) or z standard normal, [B] in float64, made by the caller; so are seeds. Times of a process are sigma
for EDM, s in [0, 1] for flow, an angle for TrigFlow; larger is noisier for all of them. Grids fall, and leave out the final zero.

    logit_normal      s = sigmoid(mean + std z)                      SD3 (ICML 2024, arXiv 2403.03206)
    mode              s = 1 - u - scale (cos^2(pi u / 2) - 1 + u)    SD3; from memory and diffusers' training_utils
    log_normal        sigma = exp(mean + std z)                      EDM (NeurIPS 2022, arXiv 2206.00364)
    trig_log_normal   t = arctan(exp(mean + std z) / sigma_data)     sCM (ICLR 2025, arXiv 2410.11081)
    log_normal_weights, consistency_intervals, consistency_ema, doubling_intervals      the curricula of CT and iCT
    shift_time        s' = k s / (1 + (k - 1) s), which is r' = k r
"""

import math

import torch
from torch import Tensor


def uniform(u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """``low + (high - low) u``; the ends may differ between samples."""
    return low + (high - low) * u


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A flow time whose logit is normal, so ``log r`` is; a larger mean is more noise."""
    return torch.sigmoid(mean + std * z)


def log_normal(z: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """An EDM sigma whose logarithm is N(mean, std^2): the median is ``exp(mean)``, below 1 for EDM's negative mean."""
    return torch.exp(mean + std * z)


def log_normal_above(u: Tensor, low: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """``log_normal`` given that it is at least ``low`` > 0, a scalar, by the inverse of its distribution function; u in [0, 1)."""
    below = torch.special.ndtr((low.log() - mean) / std)
    return log_normal(torch.special.ndtri(below + (1 - below) * u), mean, std).clamp(min=low)


def trig_log_normal(z: Tensor, mean: float = -1.0, std: float = 1.4, *, sigma_data: float = 0.5) -> Tensor:
    """A TrigFlow angle whose noise-to-signal ratio ``sigma_data tan t`` is log-normal."""
    return torch.atan(log_normal(z, mean, std) / sigma_data)


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """A flow time with density ``1 / (1 + scale (1 - pi/2))`` at 1/2: above 1 for positive scales; 0 is uniform.

    Raises:
        ValueError: scale is not in [-1, 2 / (pi - 2)], outside which the map is not monotone.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(
            f"scale {scale} is outside [-1, {2 / (math.pi - 2):.4f}]: the map would fold, and times be of another density."
        )
    return 1 - u - scale * (torch.cos(torch.pi * u / 2).square() - 1 + u)


def from_grid(u: Tensor, grid: Tensor) -> Tensor:
    """An element of the grid [n], each with probability 1 / n."""
    return grid.to(u.device)[(u * len(grid)).long()]


def segment(t: Tensor, edges: Tensor) -> Tensor:
    """Index i, int64, of the segment ``(edges[i], edges[i + 1]]`` that a time is in; the first one holds its lower edge too.

    A time on an edge is the start of the way down through the segment below it, never a segment of no length.

    Args:
        edges: [n + 1], rising.

    Raises:
        ValueError: edges do not rise, or a time is outside them.
    """
    if not (edges.diff() > 0).all():
        raise ValueError("edges must rise: a time would be in two segments or none.")
    edges = edges.to(t.device)
    if ((t < edges[0]) | (t > edges[-1])).any():
        raise ValueError(f"times {t.min():.6g}..{t.max():.6g} are outside the edges {edges[0]:.6g}..{edges[-1]:.6g}.")
    return (torch.searchsorted(edges, t.to(edges.dtype).contiguous()) - 1).clamp(min=0)


def karras_grid(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """``(sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, i = 0..n-1, float64 (EDM, eq. 5)."""
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).pow(1 / rho)
    return (ends[0] + torch.linspace(0, 1, n, dtype=torch.float64) * (ends[1] - ends[0])).pow(rho)


def log_normal_weights(grid: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """The chance of each interval of a falling EDM grid [n] under a log-normal sigma, [n - 1], summing to 1.

    ``p_i ~ erf((ln sigma_i - mean) / (sqrt(2) std)) - erf((ln sigma_{i+1} - mean) / (sqrt(2) std))``: iCT (ICLR 2024, recalled).
    """
    cdf = torch.erf((grid.double().log() - mean) / (math.sqrt(2) * std))
    weights = cdf[:-1] - cdf[1:]
    return weights / weights.sum()


def from_weights(u: Tensor, weights: Tensor) -> Tensor:
    """Index i, int64 [B], with probability ``weights[i]``, by the inverse of their cumulative sum."""
    edges = weights.to(u).cumsum(0)
    return torch.searchsorted(edges / edges[-1], u, right=True).clamp(max=len(weights) - 1)


def consistency_intervals(step: int, total: int, *, first: int = 2, last: int = 150) -> int:
    """CT's number of grid points at a step: ``N = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1`` (ICML 2023)."""
    return math.ceil(math.sqrt(step / total * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def consistency_ema(intervals: int, *, first: int = 2, decay: float = 0.9) -> float:
    """CT's decay of the target's average at ``N`` grid points: ``exp(s0 ln mu0 / N)``."""
    return math.exp(first * math.log(decay) / intervals)


def doubling_intervals(step: int, total: int, *, first: int = 10, last: int = 1280) -> int:
    """iCT's number of grid points: ``min(s0 2^floor(k / K'), s1) + 1`` with ``K' = K / (log2(s1 / s0) + 1)`` (recalled)."""
    stage = int(step * (math.log2(last / first) + 1) / total)
    return int(min(first * 2**stage, last)) + 1


def shift_time(s: Tensor, shift: float) -> Tensor:
    """The flow time whose noise-to-signal ratio is ``shift`` times that of ``s``; 0 and 1 stay."""
    return shift * s / (1 + (shift - 1) * s)


def unshift_time(s: Tensor, shift: float) -> Tensor:
    """The inverse of ``shift_time``."""
    return shift_time(s, 1 / shift)


def dynamic_shift(
    image_seq_len: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    time_shift_type: str = "exponential",
) -> float:
    """The ``shift`` of an image of that many tokens, as FLUX's pipeline and scheduler have it.

    ``mu`` is linear in the number of tokens; the shift is ``exp(mu)`` or, for the linear type, ``mu`` itself. Keywords are those of
    ``RectifiedFlow.dynamic_shift``.

    Raises:
        ValueError: no such type.

    >>> round(dynamic_shift(4096), 4)
    3.1582
    """
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    mu = image_seq_len * slope + (base_shift - slope * base_image_seq_len)
    if time_shift_type not in {"exponential", "linear"}:
        raise ValueError(f"unknown time_shift_type {time_shift_type!r}: expected exponential or linear.")
    return math.exp(mu) if time_shift_type == "exponential" else mu


def flow_grid(n: int, shift: float = 1.0, *, num_train_timesteps: int = 1000) -> Tensor:
    """The sigmas of ``FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(n)``, float64.

    diffusers shifts the last one, 1/T, when it is built and once more here. Pipelines that hand over their own sigmas (FLUX) have
    ``shift_time(torch.linspace(1, 1 / n, n), shift)`` instead.
    """
    last = shift_time(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift)
    return shift_time(torch.linspace(1, last.item(), n, dtype=torch.float64), shift)
