"""What a set of particles looks like: how far apart they are, how colourful, how likely under an exact prior of each view."""

import torch
from torch import Tensor

from fastdiff.diffusion.exact import GaussianMixture


def pair_distance(views: Tensor) -> float:
    """Root mean square difference of two particles' pictures, over all pairs; ``views`` [n, V, C, H, W] of n particles."""
    n = len(views)
    if n < 2:
        raise ValueError("one particle has no distance to another: give at least two.")
    flat = views.flatten(1).double()
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return (distance.sum() / (n * (n - 1))).item()


def chroma(views: Tensor) -> float:
    """Mean over pixels of the largest less the smallest of red, green and blue [..., 3, H, W]; 2 for pure colours in [-1, 1]."""
    return (views.amax(-3) - views.amin(-3)).mean().item()


def out_of_range(views: Tensor) -> float:
    """Share of the values outside [-1, 1], which a screen clips."""
    return (views.abs() > 1).double().mean().item()


def log_likelihood(law: GaussianMixture, views: Tensor) -> float:
    """Mean of ``log p(x | view)`` a dimension, in nats, at the first time of ``law``; view k [n, V, ...] is its class k."""
    n, count = views.shape[:2]
    labels = torch.arange(count, device=views.device).repeat(n)
    x = views.flatten(0, 1).double()
    first = torch.full((len(x),), int(law.process.t_min), device=views.device)
    return (law.log_density(x, first, labels).mean() / x[0].numel()).item()
