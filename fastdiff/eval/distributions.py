"""Distances between samples and a law that is known: for vectors, where no feature network is needed.

    sliced W2    sqrt( mean over directions u of W2^2(u.x, u.y) )             W2 in one dimension: sorted against sorted
    Gaussian W2  sqrt( |m1 - m2|^2 + tr( S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2 ) )   exact between Gaussians, of moments else

Both have a floor: two sample sets of one law are not at distance 0. Report it beside the figure.
"""

import torch
from torch import Tensor

from fastdiff.eval.frechet import frechet
from fastdiff.eval.stats import Stats


def sliced_w2(x: Tensor, y: Tensor, *, directions: int = 64, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance of samples [n, ...] and [n, ...], flattened to vectors; equal n.

    Raises:
        ValueError: different numbers of samples, whose sorted values would not pair up.
    """
    if x.shape != y.shape:
        raise ValueError(f"came {tuple(x.shape)} and {tuple(y.shape)}: sorted values pair up only at equal numbers.")
    x, y = x.flatten(1).double(), y.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(directions, x.shape[1], generator=generator, dtype=torch.float64), dim=1)
    return ((x @ unit.T).sort(dim=0).values - (y @ unit.T).sort(dim=0).values).square().mean().sqrt().item()


def gaussian_w2(samples: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Wasserstein-2 distance of the Gaussian with the samples' moments to ``N(mean, covariance)``."""
    law = Stats(2, mean.double(), covariance.double(), "coordinates")  # n = 2: m2 / (n - 1) is the covariance itself
    return max(frechet(Stats.of(samples.flatten(1), extractor="coordinates"), law).value, 0.0) ** 0.5


def covariance_error(samples: Tensor, covariance: Tensor) -> float:
    """``|S - C| / |C|`` in the Frobenius norm."""
    found = torch.cov(samples.flatten(1).double().T)
    return ((found - covariance).norm() / covariance.norm()).item()


def mode_masses(samples: Tensor, means: Tensor, deviations: Tensor, *, radius: float = 4.0) -> Tensor:
    """Share of samples [n, d] in each mode [K]: nearest in units of its deviation, and within ``radius`` of them.

    What lies near no mode counts nowhere, so that the shares need not add up to one.
    """
    distance = torch.cdist(samples.flatten(1).double(), means.double()) / deviations.double()
    near, mode = distance.min(dim=1)
    return torch.bincount(mode[near < radius], minlength=len(means)) / len(samples)
