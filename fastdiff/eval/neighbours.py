"""Distances of all pairs in blocks of rows, so that N x M never has to fit in memory, and nearest neighbours from them.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y      in float64, after the mean of y is taken off both, which keeps it from cancelling

What comes out below 1e-12 (|x|^2 + |y|^2) is round-off and counts as 0: equal rows are at distance 0 exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 128 * 2**20
"""Of one block of distances; the working memory of everything here is a small multiple of it, and the features."""


def squared_distances(x: Tensor, y: Tensor, *, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[slice, Tensor]]:
    """Blocks (rows of ``x``, squared distances [b, m] in float64 to all of ``y`` [m, d]), in the order of the rows.

    ``ValueError`` for features of different widths or without rows.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}: expected [n, d] and [m, d], n and m >= 1.")
    size = max(1, min(4096, block_bytes // (8 * len(y))))
    mean = y.mean(dim=0, dtype=torch.float64)
    columns = [part.double() - mean for part in y.detach().split(4096)] if y.dtype != torch.float64 else [y.detach() - mean]
    lengths = [part.square().sum(dim=1) for part in columns]
    for start in range(0, len(x), size):
        part = x[start : start + size].detach().double() - mean
        length, found = part.square().sum(dim=1), part.new_empty(len(part), len(y))
        for block, column, other in zip(found.split([len(c) for c in columns], dim=1), columns, lengths, strict=True):
            total = length[:, None] + other
            torch.addmm(total, part, column.T, alpha=-2, out=block)
            block.masked_fill_(block < 1e-12 * total, 0.0)
        yield slice(start, start + len(part)), found


def nearest(x: Tensor, y: Tensor, k: int = 1, *, block_bytes: int = BLOCK_BYTES) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``y`` to each of ``x``: distances and indices, both [n, k], nearest first.

    ``ValueError`` for k beyond the rows of ``y``.
    """
    if not 1 <= k <= len(y):
        raise ValueError(f"{k} nearest of {len(y)} rows: expected 1 to {len(y)}.")
    found = [block.topk(k, dim=1, largest=False) for _, block in squared_distances(x, y, block_bytes=block_bytes)]
    return torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found])
