"""A diffusers pipeline as a ``Subject``: prompts, class labels or nothing go in, images in [0, 1] come out.

The latents of image i are drawn here in float32 by its own generator, so that pipelines of equal latent shape and of any dtype
start from the same noise; the same generators go on to the pipeline, whose scheduler may draw more. A network that names no
``sample_size`` (packed latents) leaves the first draw to its pipeline, from the same generators.

>>> subject = pipeline_subject("teacher", pipeline, steps=25, guidance_scale=3.0)
>>> subject.generate(["a red boot", "a blue bag"], generators(0, [0, 1]))         # [2, 3, H, W]
"""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.cost import count_calls, network_of
from fastdiff.eval.identity import pipeline_identity
from fastdiff.eval.noise import generators
from fastdiff.eval.subject import Subject
from fastdiff.pipelines.few_step import own_call


def initial_latents(pipeline: Any, draws: list[torch.Generator], *, resolution: int | None = None) -> Tensor:
    """Standard normal latents [n, C, h, w], image i's from ``draws[i]`` alone, on the pipeline's device.

    Args:
        resolution: side of the images in pixels; None is the network's own size.

    Raises:
        UserError: the network names no size, or the autoencoder cannot make images of that side.
    """
    network: Any = network_of(pipeline)
    size = network.config.get("sample_size")
    if size is None:
        raise UserError(f"{type(network).__name__} has no sample_size, so its latents have no known shape.")
    if resolution is not None:
        factor = getattr(pipeline, "vae_scale_factor", 1)
        if resolution < 1 or resolution % factor:
            raise UserError(f"images of {resolution} pixels cannot be made of whole latents: pass a multiple of {factor}.")
        size = resolution // factor
    shape = (network.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(pipeline.device, network.dtype)


def condition(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The arguments of the pipeline's call that say what to draw: ``prompt``, ``class_labels`` or ``batch_size``.

    A class-conditional pipeline reads its prompts as class numbers; an unconditional one only counts them. ``UserError`` for a
    pipeline that takes none of the three, and for prompts that are no class numbers.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    if "prompt" in takes:
        return {"prompt": prompts}
    found: dict[str, Any] = {"batch_size": len(prompts)} if "batch_size" in takes else {}
    if "class_labels" in takes and (not found or any(prompts)):
        if not all(prompt.strip().isdecimal() for prompt in prompts):
            raise UserError(f"a {type(pipeline).__name__} draws classes: its prompts are class numbers such as 207, one an image.")
        found["class_labels"] = [int(prompt) for prompt in prompts]
    if not found:
        raise UserError(f"a {type(pipeline).__name__} takes no prompt, class_labels or batch_size: write a Subject for it.")
    return found


def pipeline_subject(
    name: str,
    pipeline: Any,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    files: Iterable[str | Path] = (),
) -> Subject:
    """A diffusers image pipeline as a subject; without steps and guidance it is called bare, and says what it took.

    One image is drawn at once: it tells the steps of a bare call, whether it guides, and the size of an image.

    Args:
        resolution: side of the images in pixels; None is the pipeline's own. A pipeline that takes no size must have that one.
        files: what the pipeline was loaded from, for its size on disk.

    Raises:
        UserError: the pipeline takes no such option, draws another size, or takes nothing that says what to draw.
    """
    network: Any = network_of(pipeline)
    takes = inspect.signature(pipeline.__call__).parameters
    asked = resolution if {"height", "width"} <= set(takes) else None
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": asked, "width": asked}
    chosen = own_call(pipeline) | {key: value for key, value in options.items() if value is not None}
    if unknown := [key for key in chosen if key not in takes]:
        raise UserError(f"{name} is a {type(pipeline).__name__}, whose call takes no {', '.join(unknown)}: leave it out.")
    own_shape = "latents" in takes and network.config.get("sample_size") is not None
    tensors = "prompt" in takes  # other pipelines know only PIL and numpy

    def generate(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        call = {**condition(pipeline, prompts), **chosen, "generator": generators, "output_type": "pt" if tensors else "np"}
        if own_shape:
            call["latents"] = initial_latents(pipeline, generators, resolution=asked)
        images = pipeline(**call).images
        return images.float().cpu() if tensors else torch.from_numpy(images).float().permute(0, 3, 1, 2)

    pipeline.set_progress_bar_config(disable=True)
    with count_calls(network) as calls:
        probe = generate([""] if "prompt" in takes or "batch_size" in takes else ["0"], generators(0, [0]))
    if resolution is not None and tuple(probe.shape[-2:]) != (resolution, resolution):
        drawn = f"{probe.shape[-2]}x{probe.shape[-1]}"
        raise UserError(f"{name} is a {type(pipeline).__name__}, whose images are {drawn} and not of {resolution} pixels a side.")
    if guidance_scale is None:
        guidance_scale = chosen.get("guidance_scale")
    if guidance_scale is None:
        guidance_scale = 1.0 if calls.samples == calls.forwards else _default_guidance(takes)
    steps = steps or calls.forwards
    return Subject(
        name=f"{name} ({steps} step{'' if steps == 1 else 's'})",
        generate=generate,
        network=network,
        networks=tuple(part for part in pipeline.components.values() if isinstance(part, nn.Module)),
        files=tuple(map(Path, files)),
        identity=lambda: pipeline_identity(pipeline),
        steps=steps,
        guidance_scale=guidance_scale,
        resolution=(probe.shape[-2], probe.shape[-1]),
        device=pipeline.device,
    )


def _default_guidance(takes: Mapping[str, inspect.Parameter]) -> float | None:
    """The guidance of a bare call that guides; None where the call does not say."""
    value = takes["guidance_scale"].default if "guidance_scale" in takes else None
    return float(value) if isinstance(value, int | float) else None
