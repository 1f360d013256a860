"""Frechet distance of few images, and of each class or group by itself.

Of n and m images with n, m < d the covariances have ranks below n and m, and the d x d roots of the usual form are mostly
round-off. With the centred features X and Y

    tr (S_1 S_2)^1/2 = |X Y^T|_* / sqrt((n - 1)(m - 1))                      the nuclear norm: sum of singular values

is exact and costs O(n m d), which makes a table over a thousand classes cheap. FD is biased by c / n, and strongly at the
n of a class: compare the same class of two models, or classes of equal n, never a class with the whole.
"""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastdiff.eval.frechet import FD, assemble, corrected, frechet, thin
from fastdiff.eval.stats import Stats

Group = TypeVar("Group", bound=Hashable)


def frechet_few(x: Tensor, reference: Tensor, *, error: bool = True) -> FD:
    """Frechet distance of features ``x`` [n, d] to ``reference`` [m, d] with its standard error, for n or m below d.

    ``frechet`` on the statistics of both gives the same number, slower; with n and m above d it is the faster one.
    ``ValueError`` for less than two images on a side.
    """
    n, m = len(x), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} images: a covariance needs two images or more on each side.")
    left, right = (f.detach().to("cpu", torch.float64) for f in (x, reference))
    delta = left.mean(dim=0) - right.mean(dim=0)
    left, right = left - left.mean(dim=0), right - right.mean(dim=0)
    s, moves = thin(left, delta, right.T / (m - 1) ** 0.5, error=error)
    total = left.square().sum() / (n - 1) + right.square().sum() / (m - 1)
    variance = moves.var() if n <= x.shape[1] else corrected(moves.var(), left.T @ left / (n - 1), s, n)
    return assemble(delta, total - 2 * s.sum(), variance, n)


def group_frechet(x: Tensor, groups: Sequence[Group], reference: Tensor, reference_groups: Sequence[Group]) -> dict[Group, FD]:
    """The Frechet distance of each group of ``x`` to the same group of ``reference``, in the order of first occurrence.

    Args:
        x, reference: features [n, d] and [m, d].
        groups, reference_groups: the class, prompt or attribute of each row; labels as a tensor by ``labels.tolist()``.

    ``ValueError`` naming the groups that have less than two images on either side.
    """
    if len(x) != len(groups) or len(reference) != len(reference_groups):
        raise ValueError(
            f"{len(x)} and {len(reference)} feature rows came with {len(groups)} and {len(reference_groups)} groups: "
            "expected one group a row."
        )
    rows, reference_rows = members(groups), members(reference_groups)
    few = [g for g in rows if len(rows[g]) < 2 or len(reference_rows.get(g, ())) < 2]
    if few:
        raise ValueError(f"{len(few)} groups such as {few[0]!r} have less than two images, or none in the reference: drop them.")
    return {g: _one(x[rows[g]], reference[reference_rows[g]]) for g in rows}


def members(groups: Sequence[Group]) -> dict[Group, list[int]]:
    """The rows of each group, in the order of first occurrence."""
    rows: dict[Group, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return rows


def _one(x: Tensor, reference: Tensor) -> FD:
    if min(len(x), len(reference)) < x.shape[1]:
        return frechet_few(x, reference)
    return frechet(Stats.of(x, extractor="features"), Stats.of(reference, extractor="features"), features=x)
