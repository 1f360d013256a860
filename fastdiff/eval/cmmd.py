"""CMMD: the Gaussian-kernel distance of two sets of CLIP image embeddings.

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),   sigma = 10

over all pairs, those of an image with itself among them (the biased V-statistic), of unit-length embeddings.
(Jayasumana et al., "Rethinking FID: towards a better evaluation metric for image generation", CVPR 2024, arXiv:2401.09603.)
As published the embeddings are those of CLIP ViT-L/14@336 of images resized to 336 by a bicubic filter without crop; of
another network it is ``CMMD[name]``.
"""

from torch import Tensor
from torch.nn.functional import normalize

from fastdiff.eval.neighbours import BLOCK_BYTES, squared_distances


def cmmd(x: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, block_bytes: int = BLOCK_BYTES) -> float:
    """CMMD of embeddings ``x`` [n, d] and ``reference`` [m, d], scaled to unit length here; 0 for equal sets.

    Of two sets of one law it expects scale (1 / n + 1 / m) (1 - E k), not 0: compare values of equal n and m only.
    """
    x, reference = normalize(x.double(), dim=1), normalize(reference.double(), dim=1)

    def mean(a: Tensor, b: Tensor) -> float:
        """Of k - 1: the ones cancel exactly, and with them the digits that they would cost."""
        total = sum(
            block.div_(-2 * sigma**2).expm1_().sum().item() for _, block in squared_distances(a, b, block_bytes=block_bytes)
        )
        return total / (len(a) * len(b))

    return scale * (mean(x, x) + mean(reference, reference) - 2 * mean(x, reference))
