"""What the gates of ``sanity`` need of an image: 72 numbers, so that a run of any length is looked at whole.

    finite, lowest, highest, one colour, checksum, mean of each channel, 64 bits of ``perceptual_hash``

An image that is not finite is looked at with zeros in place of what is not.

>>> rows = torch.cat([looks(part) for part in images.split(256)])           # [N, 72] float64
>>> highest = rows[:, HIGHEST]
"""

import zlib

import torch
from torch import Tensor

from fastdiff.eval.duplicates import perceptual_hash

FINITE, LOWEST, HIGHEST, FLAT, CHECKSUM, MEAN, HASH = 0, 1, 2, 3, 4, slice(5, 8), slice(8, 72)
WIDTH = 72


def looks(images: Tensor) -> Tensor:
    """[B, 72] in float64 of ``images`` [B, 3, H, W] that should be in [0, 1], each by itself."""
    flat = images.flatten(1)
    finite = flat.isfinite().all(dim=1)
    images = images if finite.all() else images.nan_to_num(0, 0, 0)
    low, high = images.flatten(2).aminmax(dim=2)
    sums = [zlib.crc32(image.contiguous().numpy()) for image in images.float().cpu()]
    columns = (finite, low.amin(dim=1), high.amax(dim=1), (high - low < 1 / 512).all(dim=1))
    parts = [torch.stack([c.double() for c in columns], dim=1).cpu(), torch.tensor(sums, dtype=torch.float64)[:, None]]
    return torch.cat([*parts, images.float().mean(dim=(2, 3)).double().cpu(), perceptual_hash(images).double().cpu()], dim=1)
