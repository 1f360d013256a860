"""Stable Diffusion 1.x / 2.x: a UNet2DConditionModel on KL latents, text by CLIP, VP process.

Network call ``unet(x_t, t, encoder_hidden_states)``, integer t; latents are ``scaling_factor`` times the autoencoder's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, process_from_scheduler
from fastdiff.models.denoiser import Network

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class StableDiffusion:
    """What the rest of fastdiff needs to know about a StableDiffusionPipeline."""

    pipelines = ("StableDiffusionPipeline",)
    backbone_name = "unet"
    lora_targets = LORA_TARGETS

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def backbone(self) -> nn.Module:
        """The denoising network."""
        network: nn.Module = self.pipeline.unet
        return network

    def process(self) -> tuple[NoiseProcess, str]:
        """Noise process and prediction type, from the pipeline's scheduler."""
        return process_from_scheduler(self.pipeline.scheduler.config)

    def network(self, backbone: nn.Module) -> Network:
        """``(x_t, t, cond) -> output`` for a backbone of this family."""

        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            output: Tensor = backbone(x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype), return_dict=False)[0]
            return output

        return call

    def bottleneck(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        """The module whose output discriminators look at, and its number of channels."""
        return backbone.mid_block, backbone.config.block_out_channels[-1]  # type: ignore[return-value, union-attr, index]

    @property
    def bottleneck_size(self) -> int:
        """Height and width of the bottleneck's output."""
        config = self.pipeline.unet.config
        return int(config.sample_size) // 2 ** (len(config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts to text states [B, L, D]; one longer than the tokenizer's window is cut, as the pipeline does."""
        device = next(self.pipeline.text_encoder.parameters()).device
        states: Tensor = self.pipeline.encode_prompt(prompts, device, 1, False)[0]
        return states

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] in [0, 1], float32."""
        vae = self.pipeline.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
