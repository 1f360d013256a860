"""Voxels against integrals known in closed form."""

import math

import pytest
import torch

from fastdiff.models.scenes import Camera, VoxelScenes
from fastdiff.models.scenes.voxels import blob

FRONT = Camera(torch.tensor([0.0]), torch.tensor([0.0]))
FIRST = torch.tensor([0])


def homogeneous(sigma: float, size: int = 16, pixels: int = 8) -> VoxelScenes:
    """One cube of density sigma all over, of colour 0.7 before a background of -0.4."""
    scene = VoxelScenes(1, (2, pixels, pixels), size=size)
    raw = math.log(math.expm1(sigma))
    values = {"density": raw, "colour": 0.7, "background": -0.4}
    scene.load_state_dict({name: torch.full_like(scene.state_dict()[name], value) for name, value in values.items()})
    return scene


def chord(azimuth: float) -> float:
    """Length of the line through the centre of the cube [-1, 1]^3, at elevation 0."""
    angle = math.radians(azimuth)
    return 2 / max(abs(math.cos(angle)), abs(math.sin(angle)))


@pytest.mark.parametrize("azimuth", [0.0, 30.0, 45.0, 90.0, 200.0])
def test_the_optical_depth_of_a_homogeneous_cube_is_density_times_chord(azimuth: float) -> None:
    scene = homogeneous(0.8, pixels=9)  # the pixel in the middle looks through the centre
    depth = scene.optical_depth(FIRST, Camera(torch.tensor([azimuth]), torch.tensor([0.0])))[0, 4, 4]
    assert depth.item() == pytest.approx(0.8 * chord(azimuth), rel=0.03)


def test_the_colour_behind_a_homogeneous_cube_is_emission_and_absorption() -> None:
    scene = homogeneous(0.8)
    left = math.exp(-scene.optical_depth(FIRST, FRONT)[0, 4, 4].item())
    pixel = scene(FIRST, FRONT)[0, :, 4, 4]
    assert pixel.tolist() == pytest.approx([(1 - left) * 0.7 - left * 0.4] * 2, abs=0.02)  # colour fades at the cube's edge too
    assert scene.opacity(FIRST, FRONT)[0, 4, 4].item() == pytest.approx(1 - left)


def test_the_quadrature_converges_as_steps_become_finer() -> None:
    scene = VoxelScenes(1, (3, 8, 8), size=8)
    torch.manual_seed(0)
    for p in scene.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    steps, errors = scene.steps, []
    scene.steps = 64 * steps
    limit = scene(FIRST, FRONT)
    for finer in (1, 4, 16):
        scene.steps = finer * steps
        errors.append((scene(FIRST, FRONT) - limit).abs().mean())
    assert errors[0] < 0.05 * limit.abs().mean()
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1]


def test_what_stands_in_front_hides_what_is_behind() -> None:
    """Dense slabs, red at +x and blue at -x: azimuth 0 sees red, azimuth 180 blue; at 90 red is on the left."""
    scene = VoxelScenes(1, (1, 8, 8), size=8)
    with torch.no_grad():
        scene.density.fill_(-20.0)
        scene.density[..., 1:7, [1, 6]] = 50.0  # not in the outermost voxels, where colours fade
        scene.colour[..., :4], scene.colour[..., 4:] = -1.0, 1.0
    front, side, back = (scene(FIRST, Camera(torch.tensor([a]), torch.tensor([0.0])))[0, 0, 4] for a in (0.0, 90.0, 180.0))
    assert front[3].item() == pytest.approx(1, abs=0.02)
    assert back[3].item() == pytest.approx(-1, abs=0.02)
    assert side[1].item() > 0.9
    assert side[6].item() < -0.9


def test_turning_the_scene_is_turning_the_camera_back() -> None:
    """By quarter turns about z, which map voxels to voxels: (x, y) -> (-y, x)."""
    torch.manual_seed(0)
    scene, turned = VoxelScenes(1, (3, 8, 8), size=6), VoxelScenes(1, (3, 8, 8), size=6)
    state = scene.state_dict()
    grids = {name: torch.rot90(state[name], -1, dims=(3, 4)) for name in ("density", "colour")}  # dims y, x
    turned.load_state_dict({**state, **grids})
    angle, up = torch.tensor([25.0]), torch.tensor([10.0])
    there = turned(FIRST, Camera(angle + 90, up))
    assert torch.allclose(there, scene(FIRST, Camera(angle, up)), atol=1e-5)
    assert not torch.allclose(turned(FIRST, Camera(angle, up)), there, atol=1e-2)


def test_particles_and_cameras_of_a_batch_are_independent() -> None:
    scene = VoxelScenes(3, (3, 4, 4), size=4)
    ring = Camera.turntable(4, elevation=15.0)
    index = torch.tensor([2, 0, 1, 2])
    together = scene(index, ring)
    for b in range(4):
        alone = scene(index[b : b + 1], Camera(ring.azimuth[b : b + 1], ring.elevation[b : b + 1]))
        assert torch.allclose(together[b], alone[0], atol=1e-6)
    gradient = torch.autograd.grad(scene(torch.tensor([1]), FRONT).sum(), scene.density)[0]
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0


def test_gradients_are_those_of_differences() -> None:
    scene = VoxelScenes(1, (1, 3, 3), size=3).double()
    camera = Camera(torch.tensor([33.0], dtype=torch.float64), torch.tensor([12.0], dtype=torch.float64))
    names = ["density", "colour", "background"]

    def render(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(scene, dict(zip(names, values, strict=True)), (FIRST, camera))

    assert torch.autograd.gradcheck(render, [getattr(scene, n).detach().requires_grad_() for n in names])


def test_the_blob_is_ten_in_the_middle_and_nothing_at_its_radius() -> None:
    values = blob(2)[0, 0]
    assert values.flatten().tolist() == pytest.approx([10 * (1 - math.sqrt(0.75) / 0.5)] * 8)
    assert blob(31)[0, 0, 15, 15, 15] == pytest.approx(10)
