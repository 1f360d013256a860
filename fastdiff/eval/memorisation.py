"""Did the generator copy its training images? The nearest training neighbours of each image, and how lonely the nearest is.

    ratio = |x - first neighbour| / |x - second neighbour|,     copied where the ratio is below 1/3

(Yoon et al., "Diffusion probabilistic models generalize when they fail to memorize", 2023, and Gu et al., "On memorization in
diffusion models", TMLR 2025, arXiv:2310.02664; the threshold as recalled.) The ratio needs no unit, so it compares across
features. A training image that occurs twice would hide its copies, for both neighbours are near then: neighbours at one
distance count as one. Look at the pairs of lowest ratio beside the share: a few are below 1/3 by chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.eval.neighbours import BLOCK_BYTES, nearest
from fastdiff.eval.stats import Score

THRESHOLD = 1 / 3


@dataclass(frozen=True, eq=False)
class Memorisation:
    """``copied`` is the share of images below the threshold; ``copies`` counts those that equal a training image."""

    copied: Score
    copies: int
    distances: Tensor
    """[N, k] to the nearest training images, nearest first."""
    indices: Tensor
    """[N, k] of these."""
    ratio: Tensor
    """[N], in [0, 1]; 0 for an exact copy."""

    def nearest_pairs(self, count: int = 10) -> list[tuple[int, int]]:
        """(image, training image) of the lowest ratios, lowest first: what to look at."""
        order = self.ratio.argsort(stable=True)[:count].tolist()
        return [(i, int(self.indices[i, 0])) for i in order]


def memorisation(
    x: Tensor, training: Tensor, *, threshold: float = THRESHOLD, k: int = 5, block_bytes: int = BLOCK_BYTES
) -> Memorisation:
    """Nearest of ``training`` [M, d] to each of ``x`` [N, d], by blocks, and the share of copies.

    Args:
        threshold: of the ratio.
        k: neighbours looked at; the second neighbour is the first of them at another distance than the nearest.

    ``ValueError`` for less than two training images.
    """
    if len(training) < 2:
        raise ValueError(f"{len(training)} training images: a second neighbour needs two or more.")
    distances, indices = nearest(x, training, min(max(k, 2), len(training)), block_bytes=block_bytes)
    ratio = lone_ratio(distances)
    return Memorisation(Score.of(ratio < threshold), int((distances[:, 0] == 0).sum()), distances, indices, ratio)


def lone_ratio(distances: Tensor) -> Tensor:
    """First over second of ascending ``distances`` [N, k], the second the next one that is not the first again.

    0 for an exact copy; 1 when all k distances are equal, which is no sign of a copy.
    """
    first = distances[:, 0]
    farther = distances > first[:, None] * (1 + 1e-6)
    second = distances.gather(1, farther.double().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(first == 0, 0.0, torch.where(farther.any(dim=1), first / second, 1.0))
