"""What all kinds of scenes have in common: geometry that can be kept, files, the objects of the prior."""

from pathlib import Path

import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.models.scenes import SCENES, Camera, FreeImages, GaussianScenes, VoxelScenes, load_scenes, save_scenes, turntable
from fastdiff.models.scenes.objects import OBJECTS, reference_scenes, reference_views

INDEX, RING = torch.tensor([1, 0, 1]), Camera.turntable(3, elevation=20.0)


@pytest.mark.parametrize("cls", [VoxelScenes, GaussianScenes])
def test_no_gradient_reaches_a_kept_geometry(cls: type[VoxelScenes] | type[GaussianScenes]) -> None:
    whole, kept = (cls(2, (3, 4, 4), size=4, seed=3, texture_only=t) for t in (False, True))
    assert torch.equal(whole(INDEX, RING), kept(INDEX, RING))
    assert set(dict(kept.named_parameters())) == {"colour", "background"}
    kept(INDEX, RING).square().sum().backward()
    whole(INDEX, RING).square().sum().backward()
    assert all(not getattr(kept, name).requires_grad for name in cls.geometry)
    assert torch.equal(kept.colour.grad, whole.colour.grad)
    assert kept.state_dict().keys() == whole.state_dict().keys()


def test_free_images_are_what_they_are_from_everywhere() -> None:
    images = FreeImages(2, (5,), seed=1)
    assert torch.equal(images(INDEX, RING), images.samples[INDEX])
    with pytest.raises(NotImplementedError, match="opacity"):
        images.opacity(INDEX, RING)


@pytest.mark.parametrize("cls", SCENES.values(), ids=SCENES)
def test_scenes_are_read_back_to_the_bit(cls: type, tmp_path: Path) -> None:
    options = {"size": 5} if cls.geometry else {}
    scenes = cls(3, (4, 6, 6), seed=2, **options)
    save_scenes(scenes, tmp_path, {"method": "m"})
    read = load_scenes(tmp_path)
    assert type(read) is cls
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in scenes.state_dict().items())
    assert torch.equal(read(INDEX, RING), scenes(INDEX, RING))


def test_a_folder_without_scenes_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finished run"):
        load_scenes(tmp_path)
    save_scenes(VoxelScenes(1, (1, 2, 2), size=2), tmp_path, {})
    (tmp_path / "scenes.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no scenes can be read"):
        load_scenes(tmp_path)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="no geometry"):
        FreeImages(1, (2,), texture_only=True)
    with pytest.raises(UserError, match="use images"):
        VoxelScenes(1, (2,), size=2)


def test_the_objects_are_seen_as_they_are_described() -> None:
    """The duck's beak is orange in front of a yellow head at azimuth 0 and hidden at 180; objects differ from one another."""
    views = reference_views(8)
    assert views.shape == (len(OBJECTS), 8, 3, 16, 16)
    duck = reference_scenes()
    assert all(not p.requires_grad for p in duck.parameters())
    front, back = views[4, 0], views[4, 4]
    assert (front - back).abs().max() > 0.2
    assert views[4, :, :2].mean() > views[4, :, 2].mean() + 0.2  # yellow: less blue than red and green
    flat = views.flatten(1)
    assert (torch.cdist(flat, flat) + 100 * torch.eye(5)).min() / flat.shape[1] ** 0.5 > 0.3


def test_a_turntable_has_all_particles_of_one_azimuth_together() -> None:
    scenes = GaussianScenes(2, (3, 4, 4), size=3)
    film = turntable(scenes, frames=4, elevation=15.0)
    third = Camera(torch.tensor([180.0, 180.0]), torch.tensor([15.0, 15.0]))
    assert len(film) == 8
    assert torch.allclose(film[4:6], scenes(torch.tensor([0, 1]), third), atol=1e-6)
