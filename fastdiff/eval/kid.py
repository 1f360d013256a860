"""Kernel distance of two sets of features: an unbiased estimate, so that values of different n compare.

    KID = mean over subsets of   sum_{i!=j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 sum_ij k(x_i, y_j) / m^2,
    k(x, y) = (x.y / d + 1)^3

(Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018, arXiv:1801.01401; 100 subsets of 1000 without
replacement inside a subset, drawn as torch-fidelity draws them.) It may be negative, and is often printed times 1000.

The published spread, the population sd over subsets, is no error: it falls with m and not with n, and subsets overlap. The
standard error here is that of the mean over S subsets as an estimate of the population value. With the kernel split into
effects of single images and of pairs, k(x_i, x_j) = g + a_i + a_j + e_ij, and the influence h = a_xx - a_xy,

    se^2 = 4 var h_x / n_x + 4 var h_y / n_y + 2 var e_xx / n_x^2 + 2 var e_yy / n_y^2 + 4 var e_xy / (n_x n_y) + var_S / S.

The variances come unbiased from the subsets' kernels; the pair terms are what is left between equal laws.
(Hoeffding's decomposition of a U-statistic; Serfling, "Approximation theorems of mathematical statistics", 1980, recalled.)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KID:
    """Mean over subsets, its standard error, and the published population sd over subsets."""

    value: float
    se: float
    sd: float
    subsets: int
    subset_size: int


def kid(x: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> KID:
    """Kernel distance of features ``x`` [n, d] to ``reference`` [m, d], in units of the kernel (not times 1000).

    Args:
        subsets, subset_size: as published; a subset of all of both sets is one value, and is drawn once.
        seed: of numpy's ``RandomState``; with torch-fidelity's 2020 the subsets are those of torch-fidelity.

    ``ValueError`` when a set is smaller than a subset. The error is nan for subsets of less than four images.
    """
    if x.ndim != 2 or reference.ndim != 2 or x.shape[1] != reference.shape[1]:
        raise ValueError(f"features have shapes {tuple(x.shape)} and {tuple(reference.shape)}: expected [n, d] and [m, d].")
    if not 2 <= subset_size <= min(len(x), len(reference)):
        raise ValueError(
            f"subsets of {subset_size} from {len(x)} and {len(reference)} images: expected 2 to {min(len(x), len(reference))}. "
            "The mean does not depend on subset_size, its sd does: say which you used."
        )
    draws = np.random.RandomState(seed)
    count = 1 if subset_size == len(x) == len(reference) else subsets
    values, parts = [], []
    for _ in range(count):
        a, b = (f[torch.from_numpy(draws.choice(len(f), subset_size, replace=False))].double() for f in (x, reference))
        kxx, kyy, kxy = polynomial(a, a), polynomial(b, b), polynomial(a, b)
        values.append(mmd2(kxx, kyy, kxy))
        parts.append(variances(kxx, kyy, kxy))
    found = torch.stack(values)
    sd = found.std(correction=0).item()
    vx, vy, exx, eyy, exy = torch.stack(parts).mean(dim=0).tolist()
    n, m = len(x), len(reference)
    single, pairs = 4 * vx / n + 4 * vy / m, 2 * exx / (n * (n - 1)) + 2 * eyy / (m * (m - 1)) + 4 * exy / (n * m)
    variance = max(single + pairs, pairs / 2)  # between equal laws single is 0 and its unbiased estimate as often negative
    subset_noise = sd**2 / (count - 1) if count > 1 else 0.0
    return KID(found.mean().item(), (variance + subset_noise) ** 0.5, sd, count, subset_size)


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of all pairs [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(kxx: Tensor, kyy: Tensor, kxy: Tensor) -> Tensor:
    """The unbiased squared MMD from three kernel matrices: the diagonals of the first two are left out."""
    m, n = kxy.shape
    within = (kxx.sum() - kxx.trace()) / (m * (m - 1)) + (kyy.sum() - kyy.trace()) / (n * (n - 1))
    return within - 2 * kxy.mean()


def variances(kxx: Tensor, kyy: Tensor, kxy: Tensor) -> Tensor:
    """[5]: unbiased variances of the influences of single x and y, and of the pair effects xx, yy and xy; of m images each."""
    m = len(kxx)
    if m < 4:
        return kxx.new_full((5,), torch.nan)
    rows, columns = kxy.mean(dim=1), kxy.mean(dim=0)
    exy = (kxy - rows[:, None] - columns + kxy.mean()).square().sum() / (m - 1) ** 2
    (ax, exx), (ay, eyy) = _effects(kxx), _effects(kyy)
    vx = (ax - rows).var() - exx / (m - 2) - exy / m
    vy = (ay - columns).var() - eyy / (m - 2) - exy / m
    return torch.stack([vx, vy, exx, eyy, exy])


def _effects(k: Tensor) -> tuple[Tensor, Tensor]:
    """Effects of single images [m], up to a constant, and the variance of the pairs' from a symmetric kernel off its diagonal."""
    m = len(k)
    off = k - k.diagonal().diag()
    rows = off.sum(dim=1) / (m - 1)
    single = (rows - rows.mean()) * (m - 1) / (m - 2)
    pairs = off - rows.mean() - single[:, None] - single
    pairs = pairs - pairs.diagonal().diag()
    return single, pairs.square().sum() / (m * (m - 3))
