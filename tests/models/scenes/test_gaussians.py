"""Gaussians against numerical integrals of the densities that they stand for."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff.models.scenes import Camera, GaussianScenes
from fastdiff.models.scenes.camera import pixel_grid
from fastdiff.models.scenes.gaussians import rotations

FIRST = torch.tensor([0])


def scene(k: int = 3, pixels: int = 6, seed: int = 0) -> GaussianScenes:
    made = GaussianScenes(1, (2, pixels, pixels), size=k, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data += 0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return made


def camera(azimuth: float, elevation: float) -> Camera:
    return Camera(torch.tensor([azimuth], dtype=torch.float64), torch.tensor([elevation], dtype=torch.float64))


def density(made: GaussianScenes, points: Tensor) -> Tensor:
    """The 3-D density of each Gaussian [K, ...] at world points [..., 3], from its definition."""
    turn, scales = rotations(made.quaternions[0]), made.log_scales[0].exp()
    inverse = turn @ torch.diag_embed(scales**-2) @ turn.mT
    offset = points - made.centres[0].reshape(-1, *[1] * (points.ndim - 1), 3)
    form = torch.einsum("k...i,kij,k...j->k...", offset, inverse, offset)
    return made.log_density[0].exp().reshape(-1, *[1] * (points.ndim - 1)) * (-form / 2).exp()


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (37, 20), (250, -60)])
def test_the_projection_along_a_direction_is_the_integral_of_the_density(azimuth: float, elevation: float) -> None:
    made, seen = scene(), camera(azimuth, elevation)
    uv, w = pixel_grid(6, 6, seen.azimuth), torch.linspace(-6, 6, 2001, dtype=torch.float64)
    local = torch.cat([uv[:, :, None].expand(6, 6, 2001, 2), w.expand(6, 6, 2001)[..., None]], dim=-1)
    integral = torch.trapezoid(density(made, local @ seen.rotation[0]), w, dim=-1)
    got = made._depths(FIRST, seen)[0][0]
    assert torch.allclose(got, integral, rtol=1e-6, atol=1e-9)
    assert torch.allclose(made.optical_depth(FIRST, seen)[0], integral.sum(0), rtol=1e-6, atol=1e-9)


def test_one_gaussian_before_a_background_in_closed_form() -> None:
    made = scene(k=1, pixels=1)
    with torch.no_grad():
        made.centres.zero_()
        made.log_scales.fill_(math.log(0.3))
        made.log_density.fill_(math.log(2.0))
    depth = 2.0 * math.sqrt(2 * math.pi) * 0.3
    want = (1 - math.exp(-depth)) * made.colour[0, 0] + math.exp(-depth) * made.background[0]
    assert torch.allclose(made(FIRST, camera(12, 34))[0, :, 0, 0], want)
    assert made.opacity(FIRST, camera(12, 34)).item() == pytest.approx(1 - math.exp(-depth))


def test_nearer_gaussians_hide_farther_ones() -> None:
    made = scene(k=2, pixels=1)
    with torch.no_grad():
        made.centres.copy_(torch.tensor([[[0.5, 0, 0], [-0.5, 0, 0]]]))
        made.log_scales.fill_(math.log(0.1))
        made.log_density.fill_(math.log(100.0))
        made.colour.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    assert made(FIRST, camera(0, 0))[0, :, 0, 0].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert made(FIRST, camera(180, 0))[0, :, 0, 0].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_turning_the_scene_is_turning_the_camera_back() -> None:
    made, turned = scene(), scene()
    half = math.radians(40) / 2
    a, b, c, d = turned.quaternions.detach().unbind(-1)
    w, z = math.cos(half), math.sin(half)  # 40 degrees about z, multiplied from the left
    with torch.no_grad():
        turned.quaternions.copy_(torch.stack([w * a - z * d, w * b - z * c, w * c + z * b, w * d + z * a], dim=-1))
        about_z = rotations(torch.tensor([w, 0, 0, z], dtype=torch.float64))
        turned.centres.copy_(made.centres @ about_z.mT)
    assert torch.allclose(turned(FIRST, camera(65, 10)), made(FIRST, camera(25, 10)), atol=1e-10)
    assert not torch.allclose(turned(FIRST, camera(25, 10)), made(FIRST, camera(25, 10)), atol=1e-2)


def test_gradients_are_those_of_differences() -> None:
    made, seen = scene(k=2, pixels=2), camera(33, 12)
    names = list(dict(made.named_parameters()))

    def render(*values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (FIRST, seen))

    assert torch.autograd.gradcheck(render, [getattr(made, n).detach().requires_grad_() for n in names])


def test_quaternions_turn_as_they_should() -> None:
    about_x = rotations(torch.tensor([2.0, 2.0, 0.0, 0.0]))  # 90 degrees, of any length
    assert torch.allclose(about_x @ torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
