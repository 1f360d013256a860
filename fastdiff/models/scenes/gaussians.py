r"""``GaussianScenes``: anisotropic 3-D Gaussians of density, seen in closed form.

Gaussian k has the density ``tau_k exp(-(p - m_k)^T S_k^-1 (p - m_k) / 2)``, ``S_k = Q_k diag(s_k^2) Q_k^T``. In the coordinates of
an orthographic camera, (u, v, w) = R p, its integral along the viewing direction is again a Gaussian in the picture,

    D_k(u, v) = tau_k sqrt(2 pi det S_k / det P_k) exp(-(uv - R m_k)^T P_k^-1 (uv - R m_k) / 2),   P_k = (R S_k R^T)_{uv, uv}

so the optical depth \sum_k D_k of a pixel, and with it what is left of the background, is exact. Colours are composited from
front to back in the order of the centres' depths,

    x = \sum_k c_k (1 - e^{-D_k}) e^{-\sum_{j before k} D_j} + e^{-\sum_k D_k} c_background

as in 3-D Gaussian splatting (SIGGRAPH 2023, arXiv 2308.04079), whose projection is approximate because its cameras have
perspective.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.scenes.base import Scenes, full_precision, normal
from fastdiff.models.scenes.camera import Camera, pixel_grid


class GaussianScenes(Scenes):
    """``size`` Gaussians a particle.

    Parameters: ``centres`` [n, K, 3], ``log_scales`` [n, K, 3], ``quaternions`` [n, K, 4] (w, x, y, z; normalised when used),
    ``log_density`` [n, K] of tau, ``colour`` [n, K, C], ``background`` [n, C]. Centres start normal with deviation 0.25 on each
    axis, deviations at 0.15, tau at 3.
    """

    kind = "gaussians"
    centres: Tensor
    log_scales: Tensor
    quaternions: Tensor
    log_density: Tensor
    colour: Tensor
    background: Tensor
    geometry = ("centres", "log_scales", "quaternions", "log_density")

    def __init__(self, n: int, shape: tuple[int, ...], *, size: int = 64, seed: int = 0, texture_only: bool = False) -> None:
        self.size = size
        super().__init__(n, shape, seed=seed, texture_only=texture_only)

    def options(self) -> dict[str, int]:
        return {"size": self.size}

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        n, k, channels = self.n, self.size, self.shape[0]
        return {
            "centres": 0.25 * normal(generator, n, k, 3),
            "log_scales": math.log(0.15) + 0.1 * normal(generator, n, k, 3),
            "quaternions": normal(generator, n, k, 4),
            "log_density": math.log(3.0) + 0.1 * normal(generator, n, k),
            "colour": 0.5 * normal(generator, n, 1, channels) + 0.1 * normal(generator, n, k, channels),
            "background": torch.zeros(n, channels, device="cpu"),
        }

    def forward(self, index: Tensor, camera: Camera) -> Tensor:
        with full_precision(self.background):
            depth, towards = self._depths(index, camera)
            order = towards.argsort(dim=1, descending=True)
            depth = depth.gather(1, order[:, :, None, None].expand_as(depth))
            colour = self.colour[index].gather(1, order[:, :, None].expand(-1, -1, self.shape[0]))
            before = torch.cumsum(depth, dim=1) - depth
            weight = (-before).exp() * -torch.expm1(-depth)
            left = (-depth.sum(1, keepdim=True)).exp()
            return torch.einsum("bkhw,bkc->bchw", weight, colour) + left * self.background[index][:, :, None, None]

    def opacity(self, index: Tensor, camera: Camera) -> Tensor:
        return -torch.expm1(-self.optical_depth(index, camera))

    def optical_depth(self, index: Tensor, camera: Camera) -> Tensor:
        """``\\sum_k D_k`` [B, H, W]."""
        with full_precision(self.background):
            return self._depths(index, camera)[0].sum(1)

    def _depths(self, index: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
        """D_k [B, K, H, W], and the centres' w [B, K]: the largest is nearest to the camera."""
        rotation = camera.rotation.to(self.centres)
        scales = self.log_scales[index].exp()
        axes = rotation[:, None] @ rotations(self.quaternions[index]) * scales[..., None, :]  # R Q diag(s): R S R^T = axes axes^T
        flat = axes[..., :2, :]
        a, b, c = flat[..., 0, :].square().sum(-1), (flat[..., 0, :] * flat[..., 1, :]).sum(-1), flat[..., 1, :].square().sum(-1)
        area = a * c - b.square()  # det P
        centres = self.centres[index] @ rotation.mT
        offset = pixel_grid(self.shape[-2], self.shape[-1], centres) - centres[:, :, None, None, :2]
        u, v = offset.unbind(-1)
        a, b, c, det = (value[..., None, None] for value in (a, b, c, area))
        form = (c * u.square() - 2 * b * u * v + a * v.square()) / det
        through = self.log_density[index].exp() * (2 * torch.pi / area).sqrt() * scales.prod(-1)
        return through[..., None, None] * (-0.5 * form).exp(), centres[..., 2]


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions (w, x, y, z) [..., 4] of any length but 0."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
