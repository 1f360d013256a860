"""Frechet distance of two Gaussians fitted to features, and its standard error.

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (F^T S_1 F)^1/2,   F F^T = S_2

(Dowson, Landau, "The Frechet distance between multivariate normal distributions", 1982; as FID: Heusel et al., "GANs
trained by a two time-scale update rule", NeurIPS 2017, arXiv:1706.08500.) The root is taken of a symmetric matrix, so
that eigenvalues stay real; ``scipy.linalg.sqrtm`` of S_1 S_2 is slower and returns imaginary parts when a covariance is
singular. Any factor F serves: Cholesky's costs a hundredth of the symmetric root. Of n <= d images the features X are used
themselves, centred: the trace is the sum of the singular values of X F / sqrt(n_1 - 1), without roots of round-off.

The estimate is biased upwards by about c / n: compare only values of equal n. A bootstrap is no help, since repeated
images act like a smaller n. The standard error is that of the delta method: with the optimal map T = F (F^T S_1 F)^-1/2
F^T from the first Gaussian to the second, one image moves FD by its influence

    I(x) = 2 (mu_1 - mu_2).(x - mu_1) + (x - mu_1)^T (I - T) (x - mu_1),   n_1 se^2 = max(var I - v / n_1, v / n_1).

Near the reference I vanishes, and what is left is the noise of T itself, which var I counts twice; with s the square roots of
the eigenvalues of F^T S_1 F its variance for Gaussian features is v = 2 tr S_1^2 + sum_{i<=j} 2 (s_i s_j / (s_i + s_j))^2 (ours,
from the second derivative of the trace; ``eval/coverage.py`` measures it). Of n <= d images T is not determined, and se is
that of var I alone: too large, by about 1.4 near the reference.
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
        root: any F with F F^T the covariance of ``b``, kept for many calls: ``covariance_factor(b)`` is the fastest. The
            ``covariance_root(b)`` of a file gains nothing unless the covariance is singular.
        error: False leaves the standard error nan, which saves the eigenvectors.

    The error is the sampling error of ``a``: the reference counts as given. It covers the expectation of FD at this n,
    not the limit of many images (see the bias above; ``fd_infinity`` extrapolates). ``ValueError`` for statistics of
    different features, or a root of another reference.
    """
    comparable(a, b)
    f, delta = _factor(b, root), a.mean - b.mean
    if features is not None and a.n <= len(delta):
        s, moves = thin(centred(features, a), delta, f, error=error)
        return assemble(delta, a.cov().trace() + b.cov().trace() - 2 * s.sum(), moves.var(), a.n)
    s1 = a.cov()
    values, vectors = _eigh(_congruent(s1, f), vectors=error)
    s, variance = values.sqrt(), torch.tensor(torch.nan)
    if error:
        quadratic = _quadratic(f, values, vectors)
        own = None if features is None else _influence(centred(features, a), delta, quadratic).var()
        variance = _gaussian(delta, quadratic, s1) if own is None else own
        variance = corrected(variance, s1, s, a.n)
    return assemble(delta, s1.trace() + b.cov().trace() - 2 * s.sum(), variance, a.n)


def covariance_root(stats: Stats) -> Tensor:
    """S^1/2 [d, d], symmetric and defined for a singular S too: what a file of reference statistics keeps."""
    return _power(*_eigh(stats.cov()), 0.5)


def covariance_factor(stats: Stats) -> Tensor:
    """F [d, d] with F F^T = S: Cholesky's lower triangle, or the symmetric root where S is singular."""
    lower, failed = torch.linalg.cholesky_ex(stats.cov())
    return covariance_root(stats) if failed else lower


def influences(features: Tensor, a: Stats, b: Stats, *, root: Tensor | None = None) -> Tensor:
    """What each image adds to n FD, up to a constant [n]: I(x) of the module, its mean not taken off."""
    comparable(a, b)
    f, delta = _factor(b, root), a.mean - b.mean
    x = centred(features, a)
    if a.n <= len(delta):
        return thin(x, delta, f)[1]
    return _influence(x, delta, _quadratic(f, *_eigh(_congruent(a.cov(), f))))


def thin(x: Tensor, delta: Tensor, factor: Tensor, *, error: bool = True) -> tuple[Tensor, Tensor]:
    """The singular values s of X F / sqrt(n - 1) and the influences [n] from centred features, in O(n^2 d): for n <= d.

    With X F / sqrt(n - 1) = U s V^T the trace of the root is sum s, and the quadratic form of the optimal map at the images
    themselves is diag(X T X^T) = (n - 1) diag(U s U^T), so that no d x d matrix is decomposed.

    Args:
        x: centred features [n, d]; their covariance is S_1.
        delta: mu_1 - mu_2 [d].
        factor: F [d, m] with F F^T = S_2: the root of S_2, or the reference's centred features over sqrt(n_2 - 1).
        error: False leaves the influences nan.
    """
    product = x @ factor / (len(x) - 1) ** 0.5
    if not error:
        return torch.linalg.svdvals(product), torch.full_like(x[:, 0], torch.nan)
    u, s, _ = torch.linalg.svd(product, full_matrices=False)
    return s, 2 * x @ delta + x.square().sum(dim=1) - (len(x) - 1) * (u.square() @ s)


def corrected(variance: Tensor, s1: Tensor, s: Tensor, n: int) -> Tensor:
    """n se^2 from the variance of the influences: less v / n, and no less than it (see the module)."""
    pairs = 2 * (torch.outer(s, s) / (s[:, None] + s).clamp(min=torch.finfo(s.dtype).tiny)).square()
    second = 2 * s1.square().sum() + (pairs.sum() + pairs.trace()) / 2
    return torch.maximum(variance - second / n, second / n)


def assemble(delta: Tensor, cov_term: Tensor, variance: Tensor, n: int) -> FD:
    """The distance of means ``delta`` apart, with standard error sqrt(variance / n)."""
    mean, cov = (delta @ delta).item(), max(cov_term.item(), 0.0)
    return FD(mean + cov, (variance / n).sqrt().item(), mean, cov)


def centred(features: Tensor, a: Stats) -> Tensor:
    """``features`` in float64 less their mean; ``ValueError`` when they cannot be what ``a`` was made of."""
    if features.shape != (a.n, len(a.mean)):
        raise ValueError(f"features have shape {tuple(features.shape)}, but the statistics are of {a.n} x {len(a.mean)}.")
    return features.detach().to("cpu", torch.float64) - a.mean


def _influence(x: Tensor, delta: Tensor, quadratic: Tensor) -> Tensor:
    return 2 * x @ delta + ((x @ quadratic) * x).sum(dim=1)


def _quadratic(f: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """I - T from the decomposition of F^T S_1 F."""
    return torch.eye(len(f), dtype=f.dtype) - f @ _power(values, vectors, -0.5) @ f.T


def _gaussian(delta: Tensor, quadratic: Tensor, s1: Tensor) -> Tensor:
    product = quadratic @ s1
    return 4 * delta @ s1 @ delta + 2 * (product * product.T).sum()


def _factor(b: Stats, root: Tensor | None) -> Tensor:
    """F [d, d] with F F^T = S_2: ``root`` if |root|_F^2 = tr S_2, which tells the roots of two references apart."""
    if root is None:
        return covariance_factor(b)
    cov = b.cov()
    if root.shape != cov.shape or not torch.isclose(root.double().square().sum(), cov.trace(), rtol=1e-6):
        raise ValueError(
            f"root {tuple(root.shape)} is no root of this reference's covariance: the distance would be to another "
            "reference. Pass covariance_factor(b)."
        )
    return root.to(cov)


def _congruent(s1: Tensor, f: Tensor, *, strip: int = 256) -> Tensor:
    """The lower triangle of F^T S_1 F, which is all that ``_eigh`` reads; of a triangular F in a third of the products."""
    if f.triu(1).any():
        return f.T @ s1 @ f
    product, found = torch.empty_like(s1), torch.zeros_like(s1)
    for j in range(0, len(f), strip):
        product[:, j : j + strip] = s1[:, j:] @ f[j:, j : j + strip]
    for i in range(0, len(f), strip):
        found[i : i + strip, : i + strip] = f[i:, i : i + strip].T @ product[i:, : i + strip]
    return found


def _eigh(matrix: Tensor, *, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors of a semidefinite matrix by its lower triangle; empty unless asked."""
    values, basis = torch.linalg.eigh(matrix) if vectors else (torch.linalg.eigvalsh(matrix), matrix.new_empty(0))
    return values.clamp(min=0), basis


def _power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    """Symmetric power from a decomposition; directions of round-off size count as absent."""
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    powers = torch.where(kept, values.where(kept, torch.ones_like(values)) ** exponent, torch.zeros_like(values))
    return (vectors * powers) @ vectors.T
