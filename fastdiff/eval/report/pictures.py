"""Generated images side by side: one row a model, one column a prompt and its initial noise, so that columns compare by eye."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastdiff.files import aside

_LABEL, _TEXT = 120, 12  # width of the row labels and height of a line of text, in pixels
_LARGEST = 192  # side in pixels of an image inside a page


def grid(images: Mapping[str, Tensor], prompts: Sequence[str], *, columns: int = 10, size: int = 96) -> Image.Image:
    """A picture with a row for each model and a column for each of the first ``columns`` prompts.

    Args:
        images: model name to images [N, 3, H, W] in [0, 1]; image i of every model is of prompt i.
        size: shown width and height of an image in pixels, enlarged without smoothing.
    """
    columns, font = min(columns, len(prompts)), ImageFont.load_default()
    titles = [wrap(prompt, size // 7) for prompt in prompts[:columns]]
    top = _TEXT * max(len(lines) for lines in titles) + 6
    sheet = Image.new("RGB", (_LABEL + columns * size, top + len(images) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(titles):
        draw.multiline_text((_LABEL + j * size + 3, 2), "\n".join(lines), fill="black", font=font, spacing=0)
    for i, (name, tensor) in enumerate(images.items()):
        label, y = "\n".join(wrap(name, _LABEL // 7)), top + i * size
        draw.multiline_text((3, y + 4), label, fill="black", font=font, spacing=2)
        for j, image in enumerate(tensor[:columns]):
            sheet.paste(_fit(eight_bit(image), size), (_LABEL + j * size, y))
    return sheet


def grid_png(path: str | Path, images: Mapping[str, Tensor], prompts: Sequence[str], *, columns: int = 10, size: int = 96) -> None:
    """Write ``grid`` as a PNG."""
    with aside(path) as part:
        grid(images, prompts, columns=columns, size=size).save(part, format="PNG")


def eight_bit(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [0, 1] in 8 bits, rounded to the nearest level."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy())


def inline(image: Tensor) -> str:
    """One image [3, H, W] as the data URI of a PNG, pixel for pixel up to 192 wide and high, smoothly reduced above."""
    picture = eight_bit(image)
    if max(picture.size) > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(png: bytes) -> str:
    """The bytes of a PNG as the address of an image that is inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _fit(picture: Image.Image, size: int) -> Image.Image:
    enlarged = max(picture.size) <= size
    return picture.resize((size, size), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
