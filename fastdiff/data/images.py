"""Images to files."""

from pathlib import Path

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] to uint8 by rounding (truncation would darken every pixel by half a level on average)."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def save_grid(images: Tensor, path: Path, *, columns: int = 8, zoom: int = 2) -> None:
    """Images [B, 3 or 1, H, W] in [0, 1] as one PNG, row by row; the last row is filled with white."""
    from PIL import Image

    images = images.expand(-1, 3, -1, -1)  # grey as it is
    rows = -(-len(images) // columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    tiles = to_uint8(torch.cat([images, blank])).unflatten(0, (rows, columns))
    height, width = images.shape[-2:]
    grid = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray(grid.numpy()).resize((columns * width * zoom, rows * height * zoom), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def save_gif(images: Tensor, path: Path, *, columns: int, zoom: int = 4, seconds: float = 2.4) -> None:
    """A film that loops: images [frames * n, 3 or 1, H, W] in [0, 1], the ``columns`` = n of each frame side by side."""
    from PIL import Image

    if len(images) % columns:
        raise ValueError(f"{len(images)} images are no whole number of frames of {columns}: the last one would be torn.")
    images = images.expand(-1, 3, -1, -1)
    height, width = images.shape[-2:]
    frames = to_uint8(images).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3)
    size = (columns * width * zoom, height * zoom)
    film = [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    film[0].save(path, save_all=True, append_images=film[1:], duration=round(1000 * seconds / len(film)), loop=0)
