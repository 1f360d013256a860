"""``Subject``: what an evaluation is of. It draws images, or it has them already.

A subject that draws is a function of prompts and of one generator an image, so image i is the same in every batch and on
every rank. A subject of stored images, a folder, answers for indices; it has no network and nothing of it can be timed.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.cost import parameters_m, size_mb
from fastdiff.eval.noise import generators


class Generate(Protocol):
    """Draw one image a prompt; image i's randomness is generator i's alone, and its first draw is the initial noise."""

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Images [B, 3, H, W] in [0, 1] on the CPU, drawn by ``generate`` or read by ``stored``: exactly one of the two is given.

    >>> subject.draw(prompts[8:16], seed=0, indices=range(8, 16))
    """

    name: str
    generate: Generate | None = None
    stored: Callable[[Tensor], Tensor] | None = None
    """Images of the indices [B], for images that exist already."""
    network: nn.Module | None = None
    """The denoiser, whose calls are counted."""
    networks: tuple[nn.Module, ...] = ()
    """All networks of the pipeline, whose parameters are counted."""
    files: tuple[Path, ...] = ()
    """Folders and files that it was loaded from, for its size on disk."""
    identity: Callable[[], str] | None = None
    """A hash of everything but prompt and noise that decides an image; None lets the name stand for it."""
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = ""
    """The class that took the place of the saved scheduler, if one did; None for a student, whose scheduler is part of it."""
    resolution: tuple[int, int] | None = None
    """Height and width of its images in pixels."""
    device: str | torch.device = "cpu"
    count: int | None = None
    """How many stored images there are; None where more can be drawn."""
    prompts_sha256: str = ""
    """Of the prompts that stored images were drawn for (``prompts_hash``); empty where nobody knows."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """Cost columns of stored images that were measured when they were drawn, by the names of ``Result``."""

    def __post_init__(self) -> None:
        if (self.generate is None) == (self.stored is None):
            raise ValueError(f"{self.name} needs exactly one of generate and stored: images are drawn or they are there.")

    def draw(self, prompts: Sequence[str], *, seed: int, indices: Iterable[int]) -> Tensor:
        """Images [B, 3, H, W] of ``prompts`` [B], which are numbers ``indices`` [B] of the whole list; ``checked`` comes after."""
        ids = [int(i) for i in indices]
        if self.stored is not None:
            return self.stored(torch.tensor(ids))
        assert self.generate is not None
        return self.generate(list(prompts), generators(seed, ids))

    def sizes(self) -> dict[str, float | None]:
        """The columns ``parameters_m``, ``pipeline_parameters_m`` and ``size_mb``; None where there is nothing to count."""
        return {
            "parameters_m": None if self.network is None else parameters_m(self.network),
            "pipeline_parameters_m": parameters_m(*self.networks) if self.networks else None,
            "size_mb": size_mb(*self.files) if self.files else None,
        }

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """``UserError`` when stored images are fewer than ``prompts``, or were drawn for others: image i is not of prompt i."""
        if self.count is not None and len(prompts) > self.count:
            raise UserError(f"{self.name} has {self.count} images, and {len(prompts)} are asked for: take fewer, or generate more.")
        if self.prompts_sha256 not in ("", prompts_hash(prompts)):
            raise UserError(
                f"the images of {self.name} were drawn for other prompts than these {len(prompts)} (their SHA-256 differ), so "
                "image i is not of prompt i. Pass the prompts that they were generated with, in the same order and number."
            )


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts joined by newlines, as ``Protocol.prompts_sha256`` counts it."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


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
