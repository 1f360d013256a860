"""FD at infinitely many images: the bias of FD is c / n, so FD at several n on a line in 1 / n has the limit as intercept.

    FD_n = FD_inf + c / n,      ordinary least squares of FD_n on 1 / n

(Chong, Forsyth, "Effectively unbiased FID and Inception score and where to find them", CVPR 2020, arXiv:1911.07023; its
code and dgm-eval take 15 evenly spaced sizes up to N, one random subset a size.) Here each size is the mean over as many
disjoint blocks as fit, which uses all images at every size and leaves the points less noisy and less correlated.
``blocks="one"`` is the published form. The line bends where n is not much larger than d: start above a few d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.eval.frechet import covariance_factor, frechet
from fastdiff.eval.stats import Stats


@dataclass(frozen=True)
class FDInfinity:
    """The intercept with its standard error, the slope c, and what the line was fitted to.

    ``residual`` is the root mean square of the fit in units of FD, with points - 2 degrees of freedom: a large one says
    that the points are noisy or do not lie on a line.
    """

    value: float
    se: float
    slope: float
    residual: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def published_sizes(n: int, points: int = 15) -> tuple[int, ...]:
    """``points`` evenly spaced sizes from min(5000, n / 10) to ``n``, as dgm-eval has them; fewer when some coincide."""
    start = min(5000, max(n // 10, 2))
    return tuple(dict.fromkeys(int(start + (n - start) * i / (points - 1)) for i in range(points)))


def fd_infinity(
    x: Tensor,
    reference: Stats,
    *,
    sizes: Sequence[int] | None = None,
    blocks: Literal["disjoint", "one"] = "disjoint",
    seed: int = 0,
    root: Tensor | None = None,
) -> FDInfinity:
    """The limit of the Frechet distance of ``x`` [n, d] to ``reference`` for many images of the law of ``x``.

    Args:
        sizes: of the subsets, three or more different ones from 2 to n; ``published_sizes(n)`` unless given.
        blocks: ``"disjoint"`` averages each size over floor(n / size) disjoint blocks, ``"one"`` takes one subset.
        seed: of the shuffle of the images, a new one for each size.
        root: as in ``frechet``; computed once otherwise.

    The standard error joins that of FD by its influences, which all points share and no residual shows, with that of the
    intercept by the residuals. The bias of a finite reference stays in the value: the reference counts as given.
    """
    sizes = published_sizes(len(x)) if sizes is None else tuple(sizes)
    if len(set(sizes)) < 3 or min(sizes) < 2 or max(sizes) > len(x):
        raise ValueError(f"sizes {sizes} of {len(x)} images: a line and its residual need three sizes or more from 2 to n.")
    root = covariance_factor(reference) if root is None else root
    generator = torch.Generator().manual_seed(seed)

    def fd(block: Tensor) -> float:
        return frechet(Stats.of(block, extractor=reference.extractor), reference, features=block, root=root, error=False).value

    values = []
    for size in sizes:
        order = torch.randperm(len(x), generator=generator)
        count = len(x) // size if blocks == "disjoint" else 1
        values.append(sum(fd(x[rows]) for rows in order[: count * size].split(size)) / count)
    intercept, slope, residual, error = line(torch.tensor(sizes).double().reciprocal(), torch.tensor(values).double())
    shared = frechet(Stats.of(x, extractor=reference.extractor), reference, features=x, root=root).se
    return FDInfinity(intercept, (shared**2 + error**2) ** 0.5, slope, residual, sizes, tuple(values))


def line(u: Tensor, v: Tensor) -> tuple[float, float, float, float]:
    """Least squares of v = a + c u: a, c, the root mean square residual, and the standard error of a."""
    centred = u - u.mean()
    slope = (centred @ v) / centred.square().sum()
    intercept = v.mean() - slope * u.mean()
    residual = ((v - intercept - slope * u).square().sum() / (len(u) - 2)).sqrt()
    error = residual * (1 / len(u) + u.mean().square() / centred.square().sum()).sqrt()
    return intercept.item(), slope.item(), residual.item(), error.item()
