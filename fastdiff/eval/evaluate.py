"""One row a generator: quality and cost of the same prompts from the same noise.

``evaluate`` knows no diffusers and no protocol: a ``Subject`` draws images, a ``Metric`` turns images and captions into
named numbers, and the cost columns are measured around the drawing. ``pipeline_subject`` makes a subject of a diffusers
pipeline; ``fastdiff.eval.fashion`` is the protocol of the bundled world.

>>> subject = pipeline_subject("teacher", pipeline, steps=25, guidance_scale=3.0)
>>> evaluate(subject, prompts, lambda images, captions: {"brightness": images.mean().item()}).row()
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.eval.cost import count_calls, latency, network_of, peak_memory

Metric = Callable[[Tensor, list[str]], Mapping[str, float]]


class Generate(Protocol):
    """Draw one image a prompt; all randomness is the generator's, and its first draw is the initial noise."""

    def __call__(self, prompts: list[str], generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something that draws: images [B, 3, H, W] in [0, 1] on the CPU for B prompts and a seeded CPU generator."""

    name: str
    generate: Generate
    network: nn.Module | None = None
    """The network whose calls are counted."""
    steps: int | None = None
    guidance_scale: float | None = None
    device: str | torch.device = "cpu"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one subject scored and cost; cost is None for images that were not generated."""

    model: str
    n: int
    metrics: Mapping[str, float]
    steps: int | None = None
    nfe: float | None = None
    """Network calls an image; guidance counts two."""
    guidance_scale: float | None = None
    latency_ms_p50: float | None = None
    """Milliseconds from a prompt to one image, text encoder and decoder included, after warm-up."""
    latency_ms_p95: float | None = None
    images_per_s: float | None = None
    peak_memory_mib: float | None = None
    images: Tensor = field(repr=False, compare=False)
    """[n, 3, H, W] in [0, 1], one for each of ``prompts``."""
    prompts: list[str] = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """The result without its images, for JSON."""
        before = {"model": self.model, "steps": self.steps, "nfe": self.nfe, "guidance_scale": self.guidance_scale}
        after = {k: getattr(self, k) for k in ("latency_ms_p50", "latency_ms_p95", "images_per_s", "peak_memory_mib", "n")}
        return {**before, **self.metrics, **after}


def evaluate(
    subject: Subject,
    prompts: list[str],
    metric: Metric,
    *,
    seed: int = 0,
    batch_size: int = 250,
    repeats: int = 20,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Draw an image for each prompt, score the images, and measure what they cost.

    Args:
        metric: images [N, 3, H, W] and captions to named numbers, the quality columns of the row.
        seed: batch i draws from ``noise(seed, i)``, so that subjects of equal latent shape share their initial noise.
        batch_size: images a call, for throughput and peak memory; the latency is that of a single image.
        repeats: timed single images.
        progress: called with the number of images that have just been finished.

    Raises:
        ValueError: the images are not finite, or leave [0, 1]: scores of such images would mean nothing.
    """
    network = nn.Identity() if subject.network is None else subject.network
    time_of_one = latency(lambda: subject.generate(prompts[:1], noise(seed, 0)), repeats=repeats, device=subject.device)
    images, seconds = [], 0.0
    with count_calls(network) as calls, peak_memory(subject.device) as memory:
        for i, start in enumerate(range(0, len(prompts), batch_size)):
            began, part = time.perf_counter(), prompts[start : start + batch_size]
            images.append(subject.generate(part, noise(seed, i)))
            seconds += time.perf_counter() - began
            if progress:
                progress(len(part))
    drawn = checked(torch.cat(images), len(prompts), subject.name)
    return Result(
        model=subject.name,
        n=len(drawn),
        metrics=metric(drawn, prompts),
        steps=subject.steps,
        nfe=None if subject.network is None else calls.nfe(len(drawn)),
        guidance_scale=subject.guidance_scale,
        latency_ms_p50=time_of_one.p50_ms,
        latency_ms_p95=time_of_one.p95_ms,
        images_per_s=len(drawn) / seconds,
        peak_memory_mib=memory.peak_mib,
        images=drawn,
        prompts=prompts,
    )


def noise(seed: int, batch: int) -> torch.Generator:
    """The generator of batch ``batch``; its seed is hashed, so that no training run meets this noise by counting up."""
    digest = hashlib.sha256(f"fastdiff.eval {seed} {batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def checked(images: Tensor, n: int, name: str) -> Tensor:
    """``images`` in float32, or ``ValueError`` when they are not ``n`` RGB images of finite values in [0, 1]."""
    if images.ndim != 4 or images.shape[:2] != (n, 3):
        raise ValueError(f"{name} drew {tuple(images.shape)} for {n} prompts: expected [{n}, 3, H, W], one image a prompt.")
    broken = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
    if broken:
        raise ValueError(f"{broken} of {n} images of {name} are not finite: a diverged network, or half precision that overflows.")
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(
            f"images of {name} lie in [{low:.3g}, {high:.3g}], not in [0, 1]: a missing (x + 1) / 2 shifts every score."
        )
    return images.float().clamp(0, 1)


def initial_latents(pipeline: Any, n: int, generator: torch.Generator) -> Tensor:
    """Standard normal latents [n, C, h, w] of the network's own size; ``ValueError`` when it names none."""
    network: Any = network_of(pipeline)
    size = network.config.get("sample_size")
    if size is None:
        raise ValueError(
            f"{type(network).__name__} has no sample_size, so its latents have no known shape: write a Subject for it."
        )
    shape = (n, network.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return torch.randn(shape, generator=generator).to(pipeline.device, network.dtype)


def pipeline_subject(name: str, pipeline: Any, *, steps: int | None = None, guidance_scale: float | None = None) -> Subject:
    """A diffusers text-to-image pipeline as a subject; without steps and guidance it is called bare.

    The steps of a bare call, and whether it guides, are found by drawing one image.
    """
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    chosen = {k: v for k, v in options.items() if v is not None}

    def generate(prompts: list[str], generator: torch.Generator) -> Tensor:
        latents = initial_latents(pipeline, len(prompts), generator)
        images = pipeline(prompts, latents=latents, generator=generator, output_type="pt", **chosen).images
        return images.float().cpu()

    pipeline.set_progress_bar_config(disable=True)
    with count_calls(network := network_of(pipeline)) as calls:
        generate([""], noise(0, 0))
    if guidance_scale is None and calls.samples == calls.forwards:
        guidance_scale = 1.0
    steps = steps or calls.forwards
    return Subject(
        name=f"{name} ({steps} step{'' if steps == 1 else 's'})",
        generate=generate,
        network=network,
        steps=steps,
        guidance_scale=guidance_scale,
        device=pipeline.device,
    )
