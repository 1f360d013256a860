"""Orthographic cameras on a sphere around the origin, looking at it, with z up.

A camera's axes in the world, by azimuth a and elevation e in degrees (a counts from +x towards +y):

    right   = (-sin a, cos a, 0)
    up      = (-sin e cos a, -sin e sin a, cos e)
    back    = (cos e cos a, cos e sin a, sin e)         from the origin to the camera

A point p of the world has the coordinates ``R p = (u, v, w)`` with R's rows right, up, back: u to the right of the picture, v up
in it, w towards the camera. The picture shows u, v in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Camera:
    """A batch of cameras: azimuth and elevation in degrees, each [B], of one floating dtype and device.

    >>> Camera.turntable(4).azimuth
    tensor([  0.,  90., 180., 270.])
    """

    azimuth: Tensor
    elevation: Tensor

    def __post_init__(self) -> None:
        if self.azimuth.shape != self.elevation.shape or self.azimuth.ndim != 1:
            raise ValueError(
                f"azimuth {tuple(self.azimuth.shape)} and elevation {tuple(self.elevation.shape)} must both be [B]: "
                "others would be spread over one another."
            )

    def __len__(self) -> int:
        return len(self.azimuth)

    @classmethod
    def turntable(cls, n: int, *, elevation: float = 0.0, device: torch.device | str = "cpu") -> "Camera":
        """``n`` cameras at equal steps of azimuth from 0."""
        azimuth = torch.arange(n, device=device) * (360.0 / n)
        return cls(azimuth, torch.full_like(azimuth, elevation))

    @property
    def rotation(self) -> Tensor:
        """R [B, 3, 3] from world to camera coordinates; its rows are right, up and back."""
        a, e = torch.deg2rad(self.azimuth), torch.deg2rad(self.elevation)
        zero = torch.zeros_like(a)
        right = torch.stack([-a.sin(), a.cos(), zero], dim=1)
        up = torch.stack([-e.sin() * a.cos(), -e.sin() * a.sin(), e.cos()], dim=1)
        back = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=1)
        return torch.stack([right, up, back], dim=1)

    @property
    def pose(self) -> Tensor:
        """Camera to world [B, 4, 4]: the axes as columns, and the camera's place, at distance 1 from the origin."""
        pose = torch.zeros(len(self), 4, 4, dtype=self.azimuth.dtype, device=self.azimuth.device)
        pose[:, :3, :3] = self.rotation.mT
        pose[:, :3, 3] = self.rotation[:, 2]
        pose[:, 3, 3] = 1.0
        return pose

    def sector(self, n: int) -> Tensor:
        """Which of ``n`` equal sectors of azimuth each camera is in [B]; sector k is centred at ``360 k / n`` degrees."""
        return torch.remainder((self.azimuth.double() * n / 360 + 0.5).floor(), n).long()


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(u, v) of the centres of pixels [H, W, 2]; the first row is the top one."""
    u = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) * (2 / width) - 1
    v = 1 - (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) * (2 / height)
    return torch.stack([u.expand(height, width), v[:, None].expand(height, width)], dim=-1)


def rays(camera: Camera, height: int, width: int, steps: int) -> tuple[Tensor, float]:
    """Points on the rays of all pixels, nearest to the camera first.

    Returns:
        World coordinates [B, steps, H, W, 3] of the midpoints of ``steps`` equal stretches of depth, and their length. Together
        they reach over sqrt(3) on both sides of the origin, so that from everywhere the cube [-1, 1]^3 lies between them.
    """
    length = 2 * math.sqrt(3) / steps
    uv = pixel_grid(height, width, camera.azimuth)
    w = math.sqrt(3) - (torch.arange(steps, dtype=uv.dtype, device=uv.device) + 0.5) * length
    flat = uv.expand(steps, height, width, 2)
    local = torch.cat([flat, w[:, None, None, None].expand(steps, height, width, 1)], dim=-1)
    return torch.einsum("shwi,bij->bshwj", local, camera.rotation), length


def by_direction(prompt: str, sectors: int) -> list[str]:
    """A prompt for each of ``sectors`` sectors of azimuth: ``"a boot, front view"``, then side and back views.

    Front is within 45 degrees of azimuth 0 and back within 45 degrees of 180, by the sector's centre; the rest are sides.

    >>> by_direction("a boot", 4)
    ['a boot, front view', 'a boot, side view', 'a boot, back view', 'a boot, side view']
    """
    away = [abs((360 * k / sectors + 180) % 360 - 180) for k in range(sectors)]
    return [f"{prompt}, {'front' if a <= 45 else 'back' if a >= 135 else 'side'} view" for a in away]
