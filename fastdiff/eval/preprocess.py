"""From images in [0, 1] to what a feature network is fed: 8-bit rounding, crop, resize. Each published choice by its name.

| name | resize | published by |
|---|---|---|
| ``clean`` | PIL bicubic, antialiased, each channel in float, clipped, not rounded again | clean-fid |
| ``tf1`` | bilinear on the grid i * in / out, no antialias | TTUR, ADM, EDM (inside their graph), torch-fidelity |
| ``pytorch-fid`` | bilinear on half-pixel centres, no antialias | pytorch-fid, clean-fid's ``legacy_pytorch`` |
| ``lanczos256-centre`` | centre crop to the shorter side, PIL LANCZOS to 256 in 8 bits, ``clean`` | GigaGAN, DMD2, SwiftBrush |
| ``pil-bicubic`` | PIL bicubic in 8 bits | dgm-eval, EDM2's ``pil`` path |
| ``torch-bicubic`` | torch bicubic, antialiased, clipped | EDM2's ``torch`` path |
| ``centre299`` | centre crop, no resize | DMD2's patch FID |
| ``none`` | nothing | networks that take the images as they are |

A filter, a grid or a truncation moves FD by more than most methods do, so all of it is in ``Preprocess.id``.
(Parmar, Zhang, Zhu, "On aliased resizing and surprising subtleties in GAN evaluation", CVPR 2022, arXiv:2104.11222.)
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import sparse
from torch import Tensor

from fastdiff.errors import UserError

Size = tuple[int, int]
Rounding = Literal["round", "truncate", "none"]


@dataclass(frozen=True)
class Preprocess:
    """A named way from images to a network's input.

    Args:
        name: one of the table above; the number in ``lanczos256-centre`` and ``centre299`` is free.
        rounding: how [0, 1] becomes 8 bits: ``"round"`` as a PNG holds it, ``"truncate"`` (half a level darker on average, as
            ``(255 * x).to(uint8)`` does), ``"none"`` for floats that are never stored.

    >>> Preprocess("clean")(images, (299, 299))            # levels in [0, 255], float32
    """

    name: str = "clean"
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        if self.rounding not in ("round", "truncate", "none"):
            raise UserError(f"rounding is {self.rounding!r}: expected 'round', 'truncate' or 'none'.")
        resizer(self.name)
        if self.rounding == "none" and (self.name.startswith("lanczos") or self.name == "pil-bicubic"):
            raise UserError(f"{self.name} resizes 8-bit images: rounding 'none' would be cut off silently. Take 'round'.")

    @classmethod
    def parse(cls, text: str) -> "Preprocess":
        """The inverse of ``id``: ``"clean"`` or ``"clean:truncate"``."""
        name, _, rounding = text.partition(":")
        return cls(name, rounding or "round")  # type: ignore[arg-type]

    @property
    def id(self) -> str:
        """The name, with the rounding where it is not ``"round"``."""
        return self.name if self.rounding == "round" else f"{self.name}:{self.rounding}"

    def __call__(self, images: Tensor, size: Size | None = None) -> Tensor:
        """Levels [B, 3, h, w] in [0, 255] float32 of ``images`` [B, 3 or 1, H, W] in [0, 1]; ``size`` is that of the network."""
        return self.resize(quantise(checked(images), self.rounding), size)

    def resize(self, levels: Tensor, size: Size | None = None) -> Tensor:
        """``levels`` [B, 3, H, W] that are rounded already, as those of a file are, at ``size``."""
        return resizer(self.name)(levels, size or (levels.shape[2], levels.shape[3]))


def checked(images: Tensor) -> Tensor:
    """``images`` as float32 RGB [B, 3, H, W]; ``ValueError`` unless they are finite and in [0, 1]. One channel is repeated."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        why = " Composite the alpha channel on a background first." if images.ndim == 4 and images.shape[1] == 4 else ""
        raise ValueError(f"images have shape {tuple(images.shape)}: expected [B, 3, H, W] or grey [B, 1, H, W].{why}")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: expected floats in [0, 1]; divide 8-bit levels by 255.")
    low, high = (v.item() for v in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # nan fails as well
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], not in [0, 1]: a wrong range shifts every feature.")
    return images.float().clamp(0, 1).expand(-1, 3, -1, -1)


def quantise(images: Tensor, rounding: Rounding = "round") -> Tensor:
    """Levels in [0, 255] as float32 of images in [0, 1], whole numbers unless ``rounding`` is ``"none"``."""
    levels = 255 * images
    if rounding == "none":
        return levels
    if rounding == "round":
        return levels.round()
    return (levels + 1e-4).floor()  # an 8-bit level that went through x / 255 stays itself


def clean(levels: Tensor, size: Size) -> Tensor:
    """PIL's bicubic of each channel in float, clipped to [0, 255], as products with the filter's sparse matrices: C (R x)^T.

    It agrees with PIL to 2e-4 levels, the round-off of float32, in a third of its time.
    """
    if tuple(levels.shape[2:]) == size:
        return levels
    rows, columns = bicubic_matrix(levels.shape[2], size[0]), bicubic_matrix(levels.shape[3], size[1])
    resized = torch.empty(*levels.shape[:2], *size)
    for image, target in zip(levels.detach().cpu(), resized, strict=True):  # one at a time stays in the cache
        short = torch.from_numpy(rows @ image.permute(1, 2, 0).flatten(1).numpy()).t()  # [W channels, h]
        small = torch.from_numpy(columns @ short.contiguous().view(levels.shape[3], -1).numpy()).t()  # [channels h, w]
        target.view(small.shape).copy_(small).clamp_(0, 255)
    return resized.to(levels.device)


@lru_cache(maxsize=64)
def bicubic_matrix(length: int, size: int) -> sparse.csr_array:
    """The weights [size, length] float32 of PIL's bicubic (a = -1/2), widened by length / size where that shrinks."""
    scale = length / size
    widening = max(scale, 1.0)
    centre = (np.arange(size)[:, None] + 0.5) * scale
    low, high = ((centre + side * 2 * widening + 0.5).astype(int).clip(0, length) for side in (-1, 1))
    pixel = low + np.arange(math.ceil(2 * widening) * 2 + 1)
    x = abs(pixel + 0.5 - centre) / widening
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (pixel < high)
    weight /= weight.sum(axis=1, keepdims=True)
    kept = weight != 0
    row = np.broadcast_to(np.arange(size)[:, None], pixel.shape)
    return sparse.csr_array((weight[kept].astype(np.float32), (row[kept], pixel[kept])), shape=(size, length))


def tf1(levels: Tensor, size: Size) -> Tensor:
    """Bilinear at the source positions i * in / out of TensorFlow 1 (``align_corners=False``), without antialias."""
    for axis, out in ((3, size[1]), (2, size[0])):  # along rows first, as the graph does
        length = levels.shape[axis]
        position = torch.arange(out, dtype=torch.float32) * torch.tensor(length / out, dtype=torch.float32)
        low = position.long()
        weight = (position - low).to(levels.device).view(-1, *(1,) * (3 - axis))
        left = levels.index_select(axis, low.to(levels.device))
        right = levels.index_select(axis, (low + 1).clamp(max=length - 1).to(levels.device))
        levels = left + (right - left) * weight
    return levels


def pytorch_fid(levels: Tensor, size: Size) -> Tensor:
    """Bilinear at half-pixel centres, without antialias."""
    return F.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=False)


def torch_bicubic(levels: Tensor, size: Size) -> Tensor:
    """Torch's antialiased bicubic, clipped to [0, 255]; on the device of ``levels``."""
    return F.interpolate(levels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


def pil(levels: Tensor, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """PIL on 8-bit RGB images; the result is 8 bits as well."""
    pictures = levels.detach().byte().permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(picture).resize(size[::-1], resample)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(levels.device)


def centre_crop(images: Tensor, size: Size) -> Tensor:
    """The middle ``size`` of each image, where torchvision's ``center_crop`` puts it."""
    (height, width), (h, w) = images.shape[2:], size
    if h > height or w > width:
        raise ValueError(f"a crop of {h}x{w} does not fit into images of {height}x{width}: take larger images.")
    top, left = round((height - h) / 2), round((width - w) / 2)
    return images[:, :, top : top + h, left : left + w]


def resizer(name: str) -> Callable[[Tensor, Size], Tensor]:
    """The function of a name in the module's table: levels [B, 3, H, W] and a size to levels of that size."""
    if name in RESIZERS:
        return RESIZERS[name]
    if match := re.fullmatch(r"lanczos(\d+)-centre", name):
        return partial(_lanczos_centre, side=int(match[1]))
    if match := re.fullmatch(r"centre(\d+)", name):
        return partial(_patch, side=int(match[1]))
    raise UserError(f"no preprocess {name!r}: expected one of {', '.join(RESIZERS)}, lanczos256-centre, centre299.")


def _lanczos_centre(levels: Tensor, size: Size, *, side: int) -> Tensor:
    square = centre_crop(levels, (min(levels.shape[2:]),) * 2)
    return clean(pil(square, (side, side), Image.Resampling.LANCZOS), size)


def _patch(levels: Tensor, size: Size, *, side: int) -> Tensor:
    if size not in ((side, side), tuple(levels.shape[2:])):
        raise UserError(f"centre{side} crops without resize, but the network takes {size[0]}x{size[1]}: take centre{size[0]}.")
    return centre_crop(levels, (side, side))


def _none(levels: Tensor, size: Size) -> Tensor:
    if tuple(levels.shape[2:]) != size:
        raise UserError(f"images are {levels.shape[2]}x{levels.shape[3]} and the network takes {size[0]}x{size[1]}: name a resize.")
    return levels


RESIZERS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "clean": clean,
    "tf1": tf1,
    "pytorch-fid": pytorch_fid,
    "pil-bicubic": pil,
    "torch-bicubic": torch_bicubic,
    "none": _none,
}
