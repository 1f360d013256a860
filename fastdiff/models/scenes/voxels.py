r"""``VoxelScenes``: a radiance field on a grid of voxels.

Density sigma >= 0 and colour c are interpolated trilinearly between the centres of voxels; outside the cube both are zero, towards
which they fade over the outermost half voxel. A ray is integrated by emission and absorption, nearest stretch first,

    alpha_i = 1 - exp(-sigma_i delta),   T_i = exp(-\sum_{j<i} sigma_j delta),   x = \sum_i T_i alpha_i c_i + T_end c_background

which is exact where density and colour are constant on each stretch. The density starts as a blob, softplus of
``10 (1 - |p| / 0.5)`` (ProlificDreamer and DreamFusion start so; with softplus, ours) of one colour a particle, by which they
differ from the start, and every particle has its own background colour. NeRF, ECCV 2020, arXiv 2003.08934.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.scenes.base import Scenes, full_precision, normal
from fastdiff.models.scenes.camera import Camera, rays


class VoxelScenes(Scenes):
    """``size``^3 voxels a particle; two samples of a ray lie at most one voxel apart.

    Parameters: ``density`` [n, 1, size, size, size] before the softplus, ``colour`` [n, C, size, size, size] in the order z, y,
    x, and ``background`` [n, C].
    """

    kind = "voxels"
    density: Tensor
    colour: Tensor
    background: Tensor
    geometry = ("density",)

    def __init__(self, n: int, shape: tuple[int, ...], *, size: int = 16, seed: int = 0, texture_only: bool = False) -> None:
        self.size = size
        super().__init__(n, shape, seed=seed, texture_only=texture_only)
        self.steps = math.ceil(math.sqrt(3) * size)

    def options(self) -> dict[str, int]:
        return {"size": self.size}

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        n, s, channels = self.n, self.size, self.shape[0]
        return {
            "density": blob(s) + 0.1 * normal(generator, n, 1, s, s, s),
            "colour": 0.5 * normal(generator, n, channels, 1, 1, 1) + 0.1 * normal(generator, n, channels, s, s, s),
            "background": torch.zeros(n, channels, device="cpu"),
        }

    def forward(self, index: Tensor, camera: Camera) -> Tensor:
        with full_precision(self.background):
            points, length = rays(camera, self.shape[-2], self.shape[-1], self.steps)
            grid = torch.cat([F.softplus(self.density[index]), self.colour[index]], dim=1)
            depth, colour = at(grid, points).split([1, self.shape[0]], dim=1)
            before = torch.cumsum(depth, dim=2) * length - depth * length
            weight = (-before).exp() * -torch.expm1(-depth * length)
            left = (-depth.sum(2) * length).exp()
            return (weight * colour).sum(2) + left * self.background[index][:, :, None, None]

    def opacity(self, index: Tensor, camera: Camera) -> Tensor:
        return -torch.expm1(-self.optical_depth(index, camera))

    def optical_depth(self, index: Tensor, camera: Camera) -> Tensor:
        """``\\sum_i sigma_i delta`` [B, H, W] along each pixel's ray."""
        with full_precision(self.background):
            points, length = rays(camera, self.shape[-2], self.shape[-1], self.steps)
            return at(F.softplus(self.density[index]), points)[:, 0].sum(1) * length


def at(grid: Tensor, points: Tensor) -> Tensor:
    """Values [B, C, S, H, W] of a grid [B, C, z, y, x] over the cube at ``points`` [B, S, H, W, 3]; zero outside."""
    return F.grid_sample(grid, points.to(grid), mode="bilinear", padding_mode="zeros", align_corners=False)


def blob(size: int, *, height: float = 10.0, radius: float = 0.5) -> Tensor:
    """``height (1 - |p| / radius)`` at the centres of the voxels [1, 1, size, size, size]."""
    axis = (torch.arange(size, device="cpu") + 0.5) * (2 / size) - 1
    distance = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    return height * (1 - distance / radius)[None, None]
