"""A UNet2DModel on pixels without any condition, VP process: DDPM and DDIM pipelines.

Network call ``unet(x_t, t)``, integer t, on images in [-1, 1]. Prompts are counted and not read. Both pipelines draw their first
noise themselves, from their call's generators; a student is saved as a DDIMPipeline, which makes deterministic steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import DiscreteVP, NoiseProcess
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import FeatureHead
from fastdiff.models.families.base import Family, process_of


class Unconditional(Family):
    """What the rest of fastdiff needs to know about a DDPMPipeline or a DDIMPipeline."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    gives_noise = False
    takes_latents = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        if self.pipeline.unet.config.class_embed_type or self.pipeline.unet.config.num_class_embeds:
            raise ValueError(
                f"its network takes classes, which a {type(self.pipeline).__name__} does not give it: pass the network to "
                "Teacher.from_module with the labels as its condition."
            )
        needs = "no variance-preserving process; the network of a DDPM takes the integer times of one"
        return process_of(self.pipeline.scheduler, DiscreteVP, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            del cond
            output: Tensor = backbone(x_t.to(next(backbone.parameters()).dtype), t, return_dict=False)[0]
            return output

        return call

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        module: nn.Module = backbone.mid_block  # type: ignore[assignment]
        return module

    def head(self) -> nn.Module:
        config, (_, height, width) = self.pipeline.unet.config, self.latent_shape
        down = 2 ** (len(config.block_out_channels) - 1)
        return FeatureHead(config.block_out_channels[-1], (height // down, width // down))

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        layer: Any = backbone.time_embedding
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return (config.in_channels, height, width)

    def encode(self, prompts: list[str]) -> Tensor:
        """Zeros [B]: what the network is not told."""
        return torch.zeros(len(prompts), device=next(self.backbone.parameters()).device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] as such in [0, 1], float32; a value that was clamped has no gradient."""
        return (latents.float() / 2 + 0.5).clamp(0, 1)
