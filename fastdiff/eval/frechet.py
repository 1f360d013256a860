"""Frechet distance of two Gaussians fitted to features, and its standard error.

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_2^1/2 S_1 S_2^1/2)^1/2

(Dowson, Landau, "The Frechet distance between multivariate normal distributions", 1982; as FID: Heusel et al., "GANs
trained by a two time-scale update rule", NeurIPS 2017, arXiv:1706.08500.) The root is taken of a symmetric matrix, so
that eigenvalues stay real; ``scipy.linalg.sqrtm`` of S_1 S_2 is slower and returns imaginary parts when a covariance is
singular. Of n <= d images the features themselves are used: with X the centred features and F F^T = S_2 the last trace is
the sum of the singular values of X F / sqrt(n_1 - 1), which takes no root of a round-off eigenvalue.

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


def frechet(a: Stats, b: Stats, *, features: Tensor | None = None, root: Tensor | None = None, error: bool = True) -> FD:
    """Frechet distance of the measured set ``a`` to the reference ``b``.

    Args:
        a, b: statistics of the same features, two images or more each.
        features: the features [n, d] that ``a`` was made of, for the standard error. Without them the error is that of
            Gaussian features, Var I = 4 d^T S_1 d + 2 tr ((I - T) S_1)^2, from ``a`` alone.
        root: ``covariance_root(b)``, when it is kept for many calls: it is more than half of the work.
        error: False leaves the standard error nan, which saves the eigenvectors.

    The error is the sampling error of ``a``: the reference counts as given. It covers the expectation of FD at this n,
    not the limit of many images (see the bias above; ``fd_infinity`` extrapolates). ``ValueError`` for statistics of
    different features, or a root of another reference.
    """
    comparable(a, b)
    root = covariance_root(b) if root is None else _checked(root, b)
    delta = a.mean - b.mean
    if features is not None and a.n <= len(delta):
        trace, moves = thin(centred(features, a), delta, root, error=error)
        return assemble(delta, a.cov().trace() + b.cov().trace() - 2 * trace, None if moves is None else moves.var(), a.n)
    s1 = a.cov()
    values, vectors = _eigh(root @ s1 @ root, vectors=error)
    variance = None
    if error:
        quadratic = torch.eye(len(s1), dtype=s1.dtype) - root @ _power(values, vectors, -0.5) @ root
        variance = _gaussian(delta, quadratic, s1) if features is None else _influence(features, a, delta, quadratic).var()
    return assemble(delta, s1.trace() + b.cov().trace() - 2 * values.sqrt().sum(), variance, a.n)


def covariance_root(stats: Stats) -> Tensor:
    """S^1/2 [d, d], symmetric: kept with a reference, it leaves each later ``frechet`` one decomposition."""
    return _power(*_eigh(stats.cov()), 0.5)


def influences(features: Tensor, a: Stats, b: Stats, *, root: Tensor | None = None) -> Tensor:
    """What each image adds to n FD, up to a constant [n]: I(x) of the module, its mean not taken off."""
    comparable(a, b)
    root = covariance_root(b) if root is None else _checked(root, b)
    delta = a.mean - b.mean
    if a.n <= len(delta):
        moves = thin(centred(features, a), delta, root)[1]
        assert moves is not None  # asked for
        return moves
    inner = root @ a.cov() @ root
    quadratic = torch.eye(len(delta), dtype=delta.dtype) - root @ _power(*_eigh(inner), -0.5) @ root
    return _influence(features, a, delta, quadratic)


def thin(x: Tensor, delta: Tensor, factor: Tensor, *, error: bool = True) -> tuple[Tensor, Tensor | None]:
    """tr (S_1 S_2)^1/2 and the influences [n] from centred features, in O(n^2 d): for n <= d.

    With X F / sqrt(n - 1) = U s V^T the trace is sum s, and the quadratic form of the optimal map at the images
    themselves is diag(X T X^T) = (n - 1) diag(U s U^T), so that no d x d matrix is decomposed.

    Args:
        x: centred features [n, d]; their covariance is S_1.
        delta: mu_1 - mu_2 [d].
        factor: F [d, m] with F F^T = S_2: the root of S_2, or the reference's centred features over sqrt(n_2 - 1).
        error: False leaves the influences None.
    """
    product = x @ factor / (len(x) - 1) ** 0.5
    if not error:
        return torch.linalg.svdvals(product).sum(), None
    u, s, _ = torch.linalg.svd(product, full_matrices=False)
    return s.sum(), 2 * x @ delta + x.square().sum(dim=1) - (len(x) - 1) * (u.square() @ s)


def assemble(delta: Tensor, cov_term: Tensor, variance: Tensor | None, n: int) -> FD:
    """The distance of means ``delta`` apart, with the variance of the influence of one of ``n`` images."""
    mean, cov = (delta @ delta).item(), max(cov_term.item(), 0.0)
    return FD(mean + cov, float("nan") if variance is None else (variance / n).sqrt().item(), mean, cov)


def centred(features: Tensor, a: Stats) -> Tensor:
    """``features`` in float64 less their mean; ``ValueError`` when they cannot be what ``a`` was made of."""
    if features.shape != (a.n, len(a.mean)):
        raise ValueError(f"features have shape {tuple(features.shape)}, but the statistics are of {a.n} x {len(a.mean)}.")
    return features.detach().to("cpu", torch.float64) - a.mean


def _influence(features: Tensor, a: Stats, delta: Tensor, quadratic: Tensor) -> Tensor:
    x = centred(features, a)
    return 2 * x @ delta + ((x @ quadratic) * x).sum(dim=1)


def _gaussian(delta: Tensor, quadratic: Tensor, s1: Tensor) -> Tensor:
    product = quadratic @ s1
    return 4 * delta @ s1 @ delta + 2 * (product * product.T).sum()


def _checked(root: Tensor, b: Stats) -> Tensor:
    """``root`` if |root|_F^2 = tr S, which costs d^2 and tells the roots of two references apart."""
    trace = b.cov().trace()
    if root.shape != b.m2.shape or not torch.isclose(root.square().sum().to(trace), trace, rtol=1e-6):
        raise ValueError(
            f"root {tuple(root.shape)} is no root of this reference's covariance: the distance would be to another "
            "reference. Pass covariance_root(b)."
        )
    return root.to(trace)


def _eigh(matrix: Tensor, *, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors of a positive semidefinite matrix; empty vectors unless asked."""
    matrix = (matrix + matrix.T) / 2
    values, basis = torch.linalg.eigh(matrix) if vectors else (torch.linalg.eigvalsh(matrix), matrix.new_empty(0))
    return values.clamp(min=0), basis


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """Symmetric power from a decomposition; directions of round-off size count as absent."""
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    powers = torch.where(kept, values.where(kept, torch.ones_like(values)) ** exponent, torch.zeros_like(values))
    return (vectors * powers) @ vectors.T
