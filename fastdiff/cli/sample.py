"""``fastdiff sample DIR --prompt "..."``: images of a saved pipeline, in one grid.

A student needs no further option: its folder knows its steps. A teacher takes its pipeline's own defaults unless told.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastdiff.cli.files import aside
from fastdiff.cli.options import parse
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 128  # smaller images are enlarged, pixel by pixel, to about this width


@dataclass(kw_only=True)
class Options:
    pipeline: tyro.conf.Positional[str]
    """A folder written by fastdiff or diffusers, a hub id, or the bundled teacher `fashion`."""
    prompt: tuple[str, ...]
    """What to draw; several prompts become several rows."""
    num_images: int = 16
    """Images per prompt."""
    output: Annotated[Path, tyro.conf.arg(metavar="PNG")] = Path("grid.png")
    """The picture to write."""
    steps: int | None = None
    """Inference steps; not needed for a student."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 is off; not needed for a student."""
    seed: int = 0
    """Seed of the initial noise."""
    batch_size: int = 16
    """Images per call."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""


def device_of(name: str) -> str:
    """The device called ``name``; ``auto`` takes a GPU when there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--device {name} cannot be used here: {reason} Use cpu, or leave it to auto.") from error
    return name


def draw(pipeline: Any, options: Options) -> "list[Image]":
    """The images of all prompts, in order, from one seeded stream of noise."""
    import torch

    chosen = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    call = {name: value for name, value in chosen.items() if value is not None}
    generator = torch.Generator().manual_seed(options.seed)
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_images)]
    images: list[Image] = []
    for start in range(0, len(prompts), options.batch_size):
        images += pipeline(prompts[start : start + options.batch_size], generator=generator, **call).images
    return images


def grid(images: "list[Image]", columns: int) -> "Image":
    """The images in rows of ``columns``."""
    from PIL import Image

    factor = max(1, _SHOWN // images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        tile = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def check(options: Options) -> None:
    """Refuse what would fail after the drawing."""
    from PIL import Image

    if not options.prompt or not all(prompt.strip() for prompt in options.prompt):
        raise UserError('--prompt is empty; say what to draw, such as --prompt "a red boot on a white background".')
    for name in ("num_images", "batch_size", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if Image.registered_extensions().get(options.output.suffix.lower()) is None:
        raise UserError(f"--output {options.output} has no suffix of an image file; use one such as grid.png.")


def run(argv: Sequence[str]) -> int:
    """Draw the grid."""

    def options(options: Options) -> Options:
        return options

    chosen = parse(options, argv, command="sample", description="Draw images from a saved pipeline into a grid.")
    check(chosen)
    from fastdiff.models.teacher import load_pipeline

    pipeline = load_pipeline(chosen.pipeline).to(device_of(chosen.device))
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{chosen.pipeline} is a {type(pipeline).__name__}, which takes no prompt.")
    images = draw(pipeline, chosen)
    several = len(chosen.prompt) > 1
    columns = chosen.num_images if several else max(1, round(chosen.num_images**0.5))
    with aside(chosen.output) as part:
        grid(images, columns).save(part)
    print(f"{len(images)} images in {chosen.output}")
    return 0
