"""Frechet distance of two Gaussians fitted to features, and its standard error.

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_2^1/2 S_1 S_2^1/2)^1/2

(Dowson, Landau, "The Frechet distance between multivariate normal distributions", 1982; as FID: Heusel et al., "GANs
trained by a two time-scale update rule", NeurIPS 2017, arXiv:1706.08500.) The root is taken of a symmetric matrix, so
that eigenvalues stay real; ``scipy.linalg.sqrtm`` of S_1 S_2 is slower and returns imaginary parts when a covariance is
singular.

The estimate is biased upwards by about c / n: compare only values of equal n. A bootstrap is no help, since repeated
images act like a smaller n. The standard error is that of the delta method: with the optimal map T = S_2^1/2 (S_2^1/2
S_1 S_2^1/2)^-1/2 S_2^1/2, one image moves FD by its influence

    I(x) = 2 (mu_1 - mu_2).(x - mu_1) + (x - mu_1)^T (I - T) (x - mu_1),   se = sd(I(x)) / sqrt(n_1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.eval.stats import Stats, comparable


@dataclass(frozen=True)
class FD:
    """A squared distance in feature units, its standard error, and its two terms.

    ``mean_term`` is large when all images share an error (brightness, colour), ``cov_term`` when diversity is off.
    """

    value: float
    se: float
    mean_term: float
    cov_term: float


def frechet(a: Stats, b: Stats, *, features: Tensor | None = None) -> FD:
    """Frechet distance of the measured set ``a`` to the reference ``b``.

    Args:
        a, b: statistics of the same features, two images or more each.
        features: the features [n, d] that ``a`` was made of, for the standard error. Without them the error is that of
            Gaussian features, Var I = 4 d^T S_1 d + 2 tr ((I - T) S_1)^2, from ``a`` alone.

    The error is the sampling error of ``a``: the reference counts as given. It covers the expectation of FD at this n,
    not the limit of many images (see the bias above). ``ValueError`` for statistics of different features.
    """
    comparable(a, b)
    delta, s1, s2 = a.mean - b.mean, a.cov(), b.cov()
    root = _power(s2, 0.5)
    inner = root @ s1 @ root
    cov_term = max((s1.trace() + s2.trace() - 2 * _eigh(inner)[0].sqrt().sum()).item(), 0.0)
    mean_term = (delta @ delta).item()
    a_minus_t = torch.eye(len(s1), dtype=s1.dtype) - root @ _power(inner, -0.5) @ root
    variance = _gaussian(delta, a_minus_t, s1) if features is None else influence(features, a, delta, a_minus_t).var()
    return FD(mean_term + cov_term, (variance / a.n).sqrt().item(), mean_term, cov_term)


def influence(features: Tensor, a: Stats, delta: Tensor, quadratic: Tensor) -> Tensor:
    """What each image adds to n FD, up to a constant: 2 delta.(x - mu) + (x - mu)^T quadratic (x - mu), [n]."""
    if features.shape != (a.n, len(a.mean)):
        raise ValueError(f"features have shape {tuple(features.shape)}, but the statistics are of {a.n} x {len(a.mean)}.")
    centred = features.detach().to("cpu", torch.float64) - a.mean
    return 2 * centred @ delta + ((centred @ quadratic) * centred).sum(dim=1)


def _gaussian(delta: Tensor, quadratic: Tensor, s1: Tensor) -> Tensor:
    product = quadratic @ s1
    return 4 * delta @ s1 @ delta + 2 * (product * product.T).sum()


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0), vectors


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Symmetric power of a positive semidefinite matrix; directions of round-off size count as absent."""
    values, vectors = _eigh(matrix)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    powers = torch.where(kept, values.where(kept, torch.ones_like(values)) ** exponent, torch.zeros_like(values))
    return (vectors * powers) @ vectors.T
