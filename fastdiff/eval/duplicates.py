"""Images that look the same, by a perceptual hash: mode collapse shows here before it shows in a distance.

    hash = [c_uv > median c]  for the 8 x 8 lowest frequencies c of the cosine transform of the 32 x 32 luma

64 bits that survive rescaling, compression and noise; two images are twins when few bits differ *and* their mean colours
agree, since luma alone cannot tell a red boot from a blue one. (pHash: Zauner, "Implementation and benchmarking of
perceptual image hash functions", 2010, recalled; the form of the package ImageHash, whose resize works on 8 bits, so that
single bits may differ from it.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, KEPT = 32, 8


def perceptual_hash(images: Tensor) -> Tensor:
    """Bits [N, 64] of RGB ``images`` [N, 3, H, W] in [0, 1]."""
    luma = torch.einsum("nchw,c->nhw", images.double(), images.new_tensor([0.299, 0.587, 0.114]).double())[:, None]
    if luma.shape[2:] != (SIZE, SIZE):
        luma = F.interpolate(luma, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    low = torch.einsum("ui,nij,vj->nuv", basis := _cosines().to(luma), luma[:, 0], basis).flatten(1)
    low = low.where(low.abs() > 1e-6, torch.zeros_like(low))  # flat images have no frequencies, only round-off
    ordered = low.sort(dim=1).values
    return low > ordered[:, 31:33].mean(dim=1, keepdim=True)


def twins(images: Tensor, *, bits: int = 2, colour: float = 0.02, block: int = 2048) -> Tensor:
    """Index [N] of the first earlier image that looks the same, -1 where there is none.

    Args:
        images: RGB [N, 3, H, W] in [0, 1].
        bits: how many of the 64 may differ.
        colour: how much the mean of any channel may differ.
        block: rows compared at a time with all before them.
    """
    hashes = torch.cat([perceptual_hash(part) for part in images.split(block)])
    return alike(hashes, images.float().mean(dim=(2, 3)), bits=bits, colour=colour, block=block)


def alike(hashes: Tensor, means: Tensor, *, bits: int = 2, colour: float = 0.02, block: int = 2048) -> Tensor:
    """``twins`` of images known by their hashes [N, 64] and the means [N, 3] of their channels."""
    signs, found = hashes.float() * 2 - 1, []
    for start in range(0, len(signs), block):
        rows, earlier = slice(start, start + block), slice(0, start + block)
        same = 64 - signs[rows] @ signs[earlier].T <= 2 * bits  # each bit that differs takes two off the product
        for channel in means.unbind(dim=1):
            same &= (channel[rows, None] - channel[earlier]).abs() <= colour
        same = same.tril(start - 1)
        found.append(torch.where(same.any(dim=1), same.float().argmax(dim=1), -1))
    return torch.cat(found)


def duplicates(images: Tensor, *, bits: int = 2, colour: float = 0.02) -> int:
    """How many images look like an earlier one; N - 1 when all are alike."""
    return int((twins(images, bits=bits, colour=colour) >= 0).sum())


def _cosines() -> Tensor:
    """The first rows of the orthonormal cosine transform of 32 values [8, 32]."""
    u, i = torch.arange(KEPT, dtype=torch.float64)[:, None], torch.arange(SIZE, dtype=torch.float64)
    scale = torch.where(u == 0, 1 / SIZE**0.5, (2 / SIZE) ** 0.5)
    return scale * torch.cos(torch.pi * u * (2 * i + 1) / (2 * SIZE))
