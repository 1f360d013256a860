"""Images to files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from fastdiff.data.images import save_gif, save_grid, to_uint8


def test_levels_are_rounded_and_clamped() -> None:
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 254.6 / 255, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 127, 255, 255, 255]


def test_pixels_are_those_that_diffusers_would_save() -> None:
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    theirs = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    assert np.array_equal(to_uint8(images).permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(i) for i in theirs]))


def test_grid_shows_each_image_at_its_place(tmp_path: Path) -> None:
    """All dimensions differ and are above one: a reshape without permute would mix rows, columns and channels."""
    images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "deeper" / "grid.png"
    save_grid(images, path, columns=3, zoom=2)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (2 * 4 * 2, 3 * 6 * 2, 3)
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    for i in range(6):
        row, column = divmod(i, 3)
        tile = grid[row * 8 : (row + 1) * 8, column * 12 : (column + 1) * 12]
        want = pixels[i] if i < 5 else np.full((4, 6, 3), 255, dtype=np.uint8)
        assert np.array_equal(tile, want.repeat(2, axis=0).repeat(2, axis=1))


def test_grey_images_become_grey_pixels(tmp_path: Path) -> None:
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
    save_grid(images, tmp_path / "grey.png", columns=2, zoom=1)
    pixels = np.asarray(Image.open(tmp_path / "grey.png"))
    assert pixels.shape == (4, 8, 3)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


def test_a_film_has_its_frames_in_order_side_by_side(tmp_path: Path) -> None:
    """Two frames of two 2x3 images: black and white, then white and black."""
    black, white = torch.zeros(3, 2, 3), torch.ones(3, 2, 3)
    save_gif(torch.stack([black, white, white, black]), tmp_path / "film.gif", columns=2, zoom=5)
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (2, (30, 10), 0)
        for frame, (left, right) in enumerate([(0, 255), (255, 0)]):
            film.seek(frame)
            pixels = film.convert("L")
            assert (pixels.getpixel((7, 5)), pixels.getpixel((22, 5))) == (left, right)


def test_half_a_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torn"):
        save_gif(torch.zeros(3, 3, 2, 2), tmp_path / "film.gif", columns=2)
