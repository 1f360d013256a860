"""One row a generator: quality and cost of the same prompts from the same noise.

``evaluate`` knows no diffusers and no protocol: a ``Subject`` draws images, a ``Metric`` turns images and captions into
named numbers, and the cost columns are measured around the drawing. ``fastdiff.eval.sources`` makes a subject of a folder or
a hub id; ``fastdiff.eval.fashion`` is the protocol of the bundled world.

>>> subject = pipeline_subject("teacher", pipeline, steps=25, guidance_scale=3.0)
>>> evaluate(subject, prompts, lambda images, captions: {"brightness": images.mean().item()}).row()
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.eval.cost import count_calls, energy, latency, peak_memory
from fastdiff.eval.frechet import FD
from fastdiff.eval.sanity import feature_gates, image_gates
from fastdiff.eval.scores import Scores
from fastdiff.eval.subject import Subject, checked

Metric = Callable[[Tensor, list[str]], Mapping[str, float] | Scores]
_COST = (
    "latency_ms_p50",
    "latency_ms_p95",
    "images_per_s",
    "peak_memory_mib",
    "energy_j",
    "parameters_m",
    "pipeline_parameters_m",
    "size_mb",
)


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
    energy_j: float | None = None
    """Joules an image, of the whole board in large batches; None where the driver does not tell."""
    parameters_m: float | None = None
    """Millions of parameters of the denoiser."""
    pipeline_parameters_m: float | None = None
    """Millions of parameters of all networks of the pipeline."""
    size_mb: float | None = None
    """10^6 bytes of the folder on disk; None for what lies in memory only."""
    groups: Mapping[str, FD] = field(default_factory=dict)
    """The Frechet distance of each class."""
    features: Tensor | None = field(default=None, repr=False, compare=False)
    """[n, d]: rows of two results of the same prompts and seed pair."""
    warnings: tuple[str, ...] = ()
    """What the gates of ``sanity`` have to say about the images and features."""
    images: Tensor = field(repr=False, compare=False)
    """[n, 3, H, W] in [0, 1], one for each of ``prompts``."""
    prompts: list[str] = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """The result without its images and features, for JSON; ``groups`` holds value and standard error of each class."""
        before = {"model": self.model, "steps": self.steps, "nfe": self.nfe, "guidance_scale": self.guidance_scale}
        after = {k: getattr(self, k) for k in (*_COST, "n")}
        groups = {name: [distance.value, distance.se] for name, distance in self.groups.items()}
        return {**before, **self.metrics, **after, **({"groups": groups} if groups else {})}


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

    Stored images are read instead: their cost columns hold what was measured when they were drawn, if anything was.

    Args:
        metric: images [N, 3, H, W] and captions to named numbers, the quality columns of the row, or to ``Scores``.
        seed: image i draws from ``noise.image_generator(seed, i)``, so that subjects of equal latent shape share their initial
            noise and neither ``batch_size`` nor the number of processes changes an image.
        batch_size: images a call, for throughput, energy and peak memory; the latency is that of a single image.
        repeats: timed single images.
        progress: called with the number of images that have just been finished.

    Raises:
        ValueError: the images are not finite, or leave [0, 1]: scores of such images would mean nothing.
        UserError: stored images were drawn for other prompts.
    """
    subject.check_prompts(prompts)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    if subject.stored is None:
        one = latency(lambda: subject.draw(prompts[:1], seed=seed, indices=[0]), repeats=repeats, device=subject.device)
        drawn, cost = _measured(subject, prompts, **options)
        cost |= {"latency_ms_p50": one.p50_ms, "latency_ms_p95": one.p95_ms}
    else:
        drawn, cost = torch.cat(list(_batches(subject, prompts, **options))), dict(subject.known)
    drawn = checked(drawn, len(prompts), subject.name)
    return scored(metric, drawn, prompts, model=subject.name, steps=subject.steps, guidance_scale=subject.guidance_scale, **cost)


def scored(metric: Metric, images: Tensor, prompts: list[str], **facts: Any) -> Result:
    """The result of images that are there; ``facts`` are further fields of it, ``model`` among them."""
    found = metric(images, prompts)
    scores = found if isinstance(found, Scores) else Scores(values=found)
    findings = [*image_gates(images), *([] if scores.features is None else feature_gates(scores.features))]
    return Result(
        n=len(images),
        metrics=scores.values,
        groups=scores.groups,
        features=scores.features,
        warnings=tuple(finding.message for finding in findings if finding.gate != "n"),
        images=images,
        prompts=prompts,
        **facts,
    )


def _measured(subject: Subject, prompts: list[str], **options: Any) -> tuple[Tensor, dict[str, Any]]:
    network, began = nn.Identity() if subject.network is None else subject.network, time.perf_counter()
    with count_calls(network) as calls, peak_memory(subject.device) as memory, energy(subject.device) as used:
        images = list(_batches(subject, prompts, **options))
        seconds = time.perf_counter() - began
    n = len(prompts)
    cost = {
        "nfe": None if subject.network is None else calls.nfe(n),
        "images_per_s": n / seconds,
        "peak_memory_mib": memory.peak_mib,
        "energy_j": None if used.joules is None else used.joules / n,
        **subject.sizes(),
    }
    return torch.cat(images), cost


def _batches(
    subject: Subject, prompts: list[str], *, seed: int, batch_size: int, progress: Callable[[int], None] | None
) -> Iterator[Tensor]:
    for ids in torch.arange(len(prompts)).split(batch_size):
        part = ids.tolist()
        yield subject.draw(prompts[part[0] : part[-1] + 1], seed=seed, indices=part)
        if progress:
            progress(len(part))
