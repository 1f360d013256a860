"""Stable Diffusion 1.x / 2.x: a UNet2DConditionModel on KL latents, text by CLIP, VP process.

Network call ``unet(x_t, t, encoder_hidden_states)``, integer t; latents are ``scaling_factor`` times the autoencoder's.
A network with a guidance embedding gets that of its condition's scale as ``timestep_cond``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import DiscreteVP, NoiseProcess
from fastdiff.models.condition import split_guidance
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import FeatureHead, PositionHead
from fastdiff.models.families.base import Family, decoded, process_of
from fastdiff.models.guidance_embedding import embed_guidance, guidance_width, with_guidance_embedding


class StableDiffusion(Family):
    """What the rest of fastdiff needs to know about a StableDiffusionPipeline."""

    pipelines = ("StableDiffusionPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no variance-preserving process; Stable Diffusion's network takes the integer times of one"
        return process_of(self.pipeline.scheduler, DiscreteVP, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            text, scale = split_guidance(cond)
            told = {} if scale is None else {"timestep_cond": _embedded(backbone, scale).to(dtype)}
            output: Tensor = backbone(x_t.to(dtype), t, return_dict=False, **self.inputs(text, dtype), **told)[0]
            return output

        return call

    def inputs(self, cond: Any, dtype: torch.dtype) -> dict[str, Any]:
        """What the network's call is told of a condition."""
        return {"encoder_hidden_states": cond.to(dtype)}

    def guidance_embedding(self) -> Callable[[nn.Module], nn.Module]:
        return with_guidance_embedding

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        module: nn.Module = backbone.mid_block  # type: ignore[assignment]
        return module

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        """Of the encoder, and the bottleneck."""
        unet: Any = backbone
        return [*unet.down_blocks, unet.mid_block]

    def block_heads(self) -> list[nn.Module]:
        widths = self.pipeline.unet.config.block_out_channels
        return [PositionHead(width) for width in (*widths, widths[-1])]

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        layer: Any = backbone.time_embedding
        return layer, int(layer.linear_2.out_features)

    def head(self) -> nn.Module:
        config = self.pipeline.unet.config
        size = int(config.sample_size) // 2 ** (len(config.block_out_channels) - 1)
        return FeatureHead(config.block_out_channels[-1], size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Any:
        """Prompts to text states [B, L, D]; one longer than the tokenizer's window is cut, as the pipeline does."""
        device = next(self.pipeline.text_encoder.parameters()).device
        states: Tensor = self.pipeline.encode_prompt(prompts, device, 1, False)[0]
        return states

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)


def _embedded(backbone: Any, scale: Tensor) -> Tensor:
    width = guidance_width(backbone)
    if width is None:
        raise ValueError(
            "the condition says a guidance scale, and the network has no embedding for it (time_cond_proj_dim): it would run "
            "without. Make it by the family's guidance_embedding()."
        )
    return embed_guidance(scale, width)
