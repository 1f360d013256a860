"""Two feature extractors without weights, so that a metric exists offline and for images of any kind.

``pixel-pca``: the leading principal components of small images. Without data they are those of a stationary law: if
pixels at distance k along a row, a column or the three colours have correlation rho^k, the components tend for rho -> 1 to
the discrete cosine basis B, with variances

    prod over (row, column, colour) of (B^T R B)_kk,   R_ij = rho^|i - j|,   rho = 0.95,

so the basis is written down, not fitted; the cosine basis of three channels is grey and the two opponent colours.
(Ahmed, Natarajan, Rao, "Discrete cosine transform", 1974.) ``pixel_pca(images=...)`` fits it to images instead.

``random-conv``: mean and spread of every channel of three random convolutional layers; sensitive to texture and colour,
with the seed in its name. Both see far less than a trained network: they find gross errors, not mode collapse.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.weights import state_digest

RHO = 0.95


class _Projection(nn.Module):
    mean: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    def forward(self, levels: Tensor) -> Tensor:
        return (levels.flatten(1) / 255 - self.mean) @ self.basis


def cosine(n: int) -> Tensor:
    """The orthonormal DCT-II basis [n, n] in float64, one vector a column, in ascending frequency."""
    position, frequency = torch.arange(n, dtype=torch.float64)[:, None] + 0.5, torch.arange(n, dtype=torch.float64)
    basis = (math.pi * position * frequency / n).cos() * math.sqrt(2 / n)
    return basis * torch.where(frequency == 0, math.sqrt(0.5), 1.0)


def stationary_basis(side: int, dim: int) -> Tensor:
    """The ``dim`` components [3 side^2, dim] of largest variance of a stationary law, in descending order."""

    def variance(n: int) -> Tensor:
        index = torch.arange(n, dtype=torch.float64)
        return (cosine(n) * (RHO ** (index[:, None] - index).abs() @ cosine(n))).sum(dim=0)

    colour, line = variance(3), variance(side)
    order = (colour[:, None, None] * line[:, None] * line).flatten().argsort(descending=True, stable=True)[:dim]
    c, y, x = order // side**2, order // side % side, order % side
    whole = cosine(3)[:, None, None, c] * cosine(side)[:, None, y] * cosine(side)[:, x]
    return whole.reshape(3 * side**2, dim).float()


def pixel_pca(dim: int = 64, *, side: int = 32, images: Tensor | None = None) -> FeatureExtractor:
    """Projection of ``side`` x ``side`` images on ``dim`` principal components.

    Args:
        images: [N, 3, H, W] in [0, 1], at least ``dim`` + 1, to fit the components to; the fit is part of the name then.
    """
    preprocess, size = Preprocess("torch-bicubic"), (side, side)
    if not 0 < dim <= 3 * side**2:
        raise UserError(f"pixel-pca has dim={dim}: images of {side}x{side} have 1 to {3 * side**2} components.")
    if images is None:
        network = _Projection(torch.full((3 * side**2,), 0.5), stationary_basis(side, dim))
        return FeatureExtractor(name=f"pixel-pca{dim}-{side}", network=network, preprocess=preprocess, dim=dim, size=size)
    if len(images) <= dim:
        raise UserError(f"pixel-pca fits {dim} components to {len(images)} images: it needs at least {dim + 1}.")
    x = (preprocess(images, size).flatten(1) / 255).double()
    mean = x.mean(dim=0)
    basis = torch.linalg.svd(x - mean, full_matrices=False).Vh[:dim].T
    network = _Projection(mean.float(), basis.float().contiguous())
    return FeatureExtractor(
        name=f"pixel-pca{dim}-{side}", network=network, preprocess=preprocess, dim=dim, size=size, digest=state_digest(network)
    )


class _RandomConv(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterList()
        for width_in, width_out in ((3, width), (width, width), (width, width)):
            kernel = torch.randn(width_out, width_in, 3, 3, generator=generator)
            self.layers.append(nn.Parameter(kernel * math.sqrt(2 / (9 * width_in))))

    def forward(self, levels: Tensor) -> Tensor:
        x, found = levels / 127.5 - 1, []
        for kernel in self.layers:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel).relu()
            found += [x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0).add(1e-8).sqrt()]
            x = F.avg_pool2d(x, 2)
        return torch.cat(found, dim=1)


def random_conv(width: int = 32, *, seed: int = 0, side: int = 64, preprocess: str = "torch-bicubic") -> FeatureExtractor:
    """6 ``width`` features: mean and standard deviation of the channels of three random layers, at three resolutions."""
    return FeatureExtractor(
        name=f"random-conv{width}-{seed}" if side == 64 else f"random-conv{width}-{seed}-{side}",
        network=_RandomConv(width, seed),
        preprocess=Preprocess.parse(preprocess),
        dim=6 * width,
        size=(side, side),
    )
