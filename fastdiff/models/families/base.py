"""``Family``: what the rest of fastdiff needs to know about a kind of teacher. A new one is one file with one subclass."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess
from fastdiff.diffusion.schedulers import process_from_scheduler
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Network


class Family(ABC):
    """Calls the network, encodes conditions, knows shapes, process and prediction type."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of the diffusers pipeline classes it serves."""
    lora_targets: tuple[str, ...] = ()
    """Names (or ends of names) of the layers a LoRA role adapts by default."""
    part: ClassVar[str] = "unet"
    """The pipeline's name of the denoising network."""
    gives_noise: ClassVar[bool] = True
    """Whether the pipeline hands its call's generators to the scheduler, so that noise between the steps can be repeated."""
    takes_latents: ClassVar[bool] = True
    """Whether the pipeline's call takes its first noise; if not, it draws that from its generators, one a sample."""
    gives_sigmas: ClassVar[bool] = False
    """Whether the pipeline tells a flow scheduler its sigmas, evenly spaced, and does not leave them to it."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Arguments of the pipeline's call that a sample's size depends on, where the network itself has none."""
    size: Mapping[str, int] = MappingProxyType({})
    """Values of some of ``sizes``, in the place of the call's defaults."""
    pipeline: Any = None
    """The diffusers pipeline, or None for a teacher that has none."""

    @property
    def backbone(self) -> nn.Module:
        """The denoising network."""
        network: nn.Module = getattr(self.pipeline, self.part)
        return network

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the process, such as (C, h, w)."""

    @abstractmethod
    def process(self) -> tuple[NoiseProcess, str]:
        """Noise process and prediction type."""

    @abstractmethod
    def network(self, backbone: nn.Module) -> Network:
        """``(x_t, network_time, cond) -> output`` for a backbone of this family."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Any:
        """The condition of a batch of prompts; that of ``""`` is the null condition."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Samples of the process as what a user sees: images [B, 3, H, W] in [0, 1] where there are any. Differentiable."""

    def head(self) -> nn.Module:
        """A discriminator head for the features of ``bottleneck``.

        Raises:
            NotImplementedError: this family has no place to look at.
        """
        raise NotImplementedError(f"{type(self).__name__} has no bottleneck for a discriminator.")

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        """The module of a backbone whose output discriminators look at."""
        raise NotImplementedError(f"{type(self).__name__} has no bottleneck for a discriminator.")

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        """The blocks of a backbone, in the order in which they run, that a discriminator of many levels looks at."""
        return [self.bottleneck(backbone)]

    def block_heads(self) -> list[nn.Module]:
        """A discriminator head for the features of each of ``blocks``: logits [B] or [B, N]."""
        return [self.head()]

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        """The layer of a backbone that puts out the embedded time [B, D], and D.

        Raises:
            NotImplementedError: this family names none.
        """
        raise NotImplementedError(f"{type(self).__name__} names no layer that puts out the embedded time.")

    def guidance_embedding(self) -> Callable[[nn.Module], nn.Module]:
        """What makes of a backbone a network that is told its guidance scale (``condition.with_guidance``), the same until trained.

        Raises:
            NotImplementedError: this family has no such network.
        """
        raise NotImplementedError(f"{type(self).__name__} has no network that is told its guidance scale.")

    def sprint_network(self) -> Callable[[nn.Module], nn.Module] | None:
        """What makes of a backbone the network that a stock pipeline of sCM students calls; None where there is no such one."""
        return None

    @property
    def call(self) -> dict[str, Any]:
        """What the pipeline's call must be told besides prompts to draw samples of ``latent_shape``; mostly nothing."""
        return {}

    def asked(self, name: str) -> int:
        """One of ``sizes``: as it was asked for, or what the pipeline's call takes by default."""
        return int(self.size.get(name, default(self.pipeline.__call__, name)))

    def drawn_from(self, noise: Tensor) -> Tensor:
        """The ``latents`` that the pipeline's call takes for unit noise [B, *latent_shape]; mostly itself."""
        return noise

    def networks(self) -> list[nn.Module]:
        """Every network that has a part in what the teacher makes of a prompt."""
        if self.pipeline is None:
            return [self.backbone]
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device | str) -> None:
        """Move all networks."""
        for network in self.networks():
            network.to(device)


def process_of(scheduler: Any, kind: type[NoiseProcess], needs: str) -> tuple[NoiseProcess, str]:
    """The process and prediction type that a pipeline's scheduler describes.

    Args:
        needs: what a network of this family needs, and what went wrong without.

    Raises:
        ValueError: it is another kind of process.
    """
    process, prediction_type = process_from_scheduler(scheduler)
    if not isinstance(process, kind):
        raise ValueError(f"its scheduler describes a {type(process).__name__}, {needs} and would be run at times it never saw.")
    return process, prediction_type


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] as images [B, 3, H, W] in [0, 1], float32; a value that was clamped has no gradient."""
    own = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(own.to(vae.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def class_numbers(prompts: list[str], count: int, *, null: int) -> Tensor:
    """Class numbers [B], int64, of prompts such as "207"; ``null`` for the empty prompt.

    Raises:
        UserError: a prompt is no number of one of ``count`` classes.
    """
    for prompt in prompts:
        if prompt and not (prompt.strip().isdecimal() and int(prompt) < count):
            raise UserError(f"the prompt {prompt!r} is no class: this teacher draws classes 0 to {count - 1}, written as numbers.")
    return torch.tensor([int(prompt) if prompt else null for prompt in prompts])


def default(call: Callable[..., Any], name: str) -> Any:
    """What a pipeline's method takes for ``name`` where it is not told."""
    return inspect.signature(call).parameters[name].default


def window(pipeline: Any, tokenizer: Any) -> int:
    """Text tokens that the pipeline's call asks of a tokenizer: its ``max_sequence_length``, or the tokenizer's own where less."""
    return min(int(default(pipeline.__call__, "max_sequence_length")), int(tokenizer.model_max_length))
