"""Precision, recall, density and coverage: is each image where real ones are, and is each real one met?

Balls around each image reach to its k-th nearest other image of its own set, r_k:

    precision = share of x inside some ball of y           density  = mean over x of the number of balls of y around it, / k
    recall    = share of y inside some ball of x           coverage = share of balls of y that hold some x

(Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019, arXiv:1904.06991;
Naeem et al., "Reliable fidelity and diversity metrics for generative models", ICML 2020, arXiv:2002.09797.) The conventions
are those of Naeem's code: rank 0 of the neighbours is the image itself, and inside is strictly nearer than r_k. With k = 5
here and there; Kynkaanniemi takes 3 and, as the evaluator of guided-diffusion does, <= instead of <.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.eval.neighbours import BLOCK_BYTES, squared_distances

_TIE = 1 - 1e-9  # distances that agree to this are equal, whatever block they were computed in


@dataclass(frozen=True)
class PRDC:
    """Shares in [0, 1]; density alone can exceed 1, where x crowds the densest part of y."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def prdc(x: Tensor, reference: Tensor, *, k: int = 5, block_bytes: int = BLOCK_BYTES) -> PRDC:
    """The four shares of features ``x`` [n, d] against ``reference`` [m, d], by blocks of at most ``block_bytes``.

    They depend on n and m: compare values of equal n, m and k only. ``ValueError`` when a set has no k-th neighbour.
    """
    if not 1 <= k < min(len(x), len(reference)):
        raise ValueError(f"k = {k} with {len(x)} and {len(reference)} images: the k-th other image needs 1 <= k < n and k < m.")
    inner, outer = radii(x, k, block_bytes=block_bytes), radii(reference, k, block_bytes=block_bytes)
    inside = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    recalled, covered = 0, 0
    for rows, squared in squared_distances(reference, x, block_bytes=block_bytes):
        within = squared < outer[rows, None]
        inside += within.sum(dim=0)
        covered += int(within.any(dim=1).sum())
        recalled += int((squared < inner).any(dim=1).sum())
    return PRDC(
        precision=(inside > 0).double().mean().item(),
        recall=recalled / len(reference),
        density=inside.double().mean().item() / k,
        coverage=covered / len(reference),
        k=k,
    )


def radii(x: Tensor, k: int, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Squared distance [n] of each row of ``x`` to its k-th nearest other, less what separates a tie from round-off."""
    blocks = squared_distances(x, x, block_bytes=block_bytes)
    return torch.cat([block.kthvalue(k + 1, dim=1).values for _, block in blocks]) * _TIE
