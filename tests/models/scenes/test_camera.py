"""Cameras: axes, poses, sectors, rays."""

import math

import pytest
import torch

from fastdiff.models.scenes.camera import Camera, by_direction, pixel_grid, rays


def camera(*angles: tuple[float, float]) -> Camera:
    azimuth, elevation = torch.tensor(angles, dtype=torch.float64).unbind(1)
    return Camera(azimuth, elevation)


def test_axes_are_those_that_one_knows() -> None:
    front, side, top = camera((0, 0), (90, 0), (0, 90)).rotation
    assert torch.allclose(front, torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(side, torch.tensor([[-1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(top[2], torch.tensor([0, 0, 1], dtype=torch.float64), atol=1e-12)


def test_rotations_are_proper_and_poses_undo_them() -> None:
    seen = camera((30, 20), (200, -50), (359, 89))
    eye = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    assert torch.allclose(seen.rotation @ seen.rotation.mT, eye, atol=1e-12)
    assert torch.allclose(torch.linalg.det(seen.rotation), torch.ones(3, dtype=torch.float64))
    world_of_axis_w = seen.pose @ torch.tensor([0, 0, 1, 0], dtype=torch.float64)
    assert torch.allclose(world_of_axis_w, seen.pose[:, :, 3] - torch.tensor([0, 0, 0, 1.0]), atol=1e-12)  # looks at the origin
    assert torch.equal(seen.pose[:, 3], torch.tensor([0, 0, 0, 1.0], dtype=torch.float64).expand(3, 4))


def test_the_first_pixel_is_up_on_the_left() -> None:
    grid = pixel_grid(2, 4, torch.zeros(1))
    assert grid[0, 0].tolist() == [-0.75, 0.5]
    assert grid[1, 3].tolist() == [0.75, -0.5]


def test_rays_run_away_from_the_camera_and_through_the_whole_cube() -> None:
    points, length = rays(camera((0, 0)), 1, 1, 10)
    assert torch.allclose(points[0, :, 0, 0, 1:], torch.zeros(10, 2, dtype=torch.float64), atol=1e-12)
    assert (points[0, :, 0, 0, 0].diff() + length).abs().max() < 1e-12
    assert math.isclose(points[0, 0, 0, 0, 0].item() + length / 2, math.sqrt(3))


def test_sectors_are_centred_at_their_azimuth() -> None:
    assert camera((0, 0), (44, 0), (46, 0), (134, 0), (316, 0), (359, 0), (270, 0)).sector(4).tolist() == [0, 0, 1, 1, 0, 0, 3]
    assert camera((123, 0)).sector(1).tolist() == [0]


def test_prompts_name_what_is_seen() -> None:
    named = ["front", "front", "side", "back", "back", "back", "side", "front"]
    assert by_direction("a boot", 8) == [f"a boot, {direction} view" for direction in named]


def test_angles_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="spread over one another"):
        Camera(torch.zeros(3), torch.zeros(1))
