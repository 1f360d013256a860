"""``Family``: what the rest of fastdiff needs to know about a kind of teacher. A new one is one file with one subclass."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess
from fastdiff.models.denoiser import Network


class Family(ABC):
    """Calls the network, encodes conditions, knows shapes, process and prediction type."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of the diffusers pipeline classes it serves."""
    lora_targets: tuple[str, ...] = ()
    """Names (or ends of names) of the layers a LoRA role adapts by default."""
    pipeline: Any = None
    """The diffusers pipeline, or None for a teacher that has none."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The denoising network."""

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

    def networks(self) -> list[nn.Module]:
        """Every network that has a part in what the teacher makes of a prompt."""
        if self.pipeline is None:
            return [self.backbone]
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device | str) -> None:
        """Move all networks."""
        for network in self.networks():
            network.to(device)
