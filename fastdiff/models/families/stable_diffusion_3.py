"""Stable Diffusion 3 and 3.5: a joint transformer on KL latents, text by two CLIPs and T5, rectified flow.

Network call ``transformer(x_t, states, pooled, 1000 t)``, predicting ``v = eps - x0``; latents are ``scaling_factor`` times the
autoencoder's less ``shift_factor``. A condition holds text states [B, L, C] and pooled ones [B, P]. The pipeline hands its
scheduler no generators, so that noise between a student's steps could not be repeated.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import TokenHead
from fastdiff.models.families.base import Family, decoded, process_of, window


class StableDiffusion3(Family):
    """What the rest of fastdiff needs to know about a StableDiffusion3Pipeline."""

    pipelines = ("StableDiffusion3Pipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"
    gives_noise = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no rectified flow; Stable Diffusion 3's network predicts the velocity of one"
        return process_of(self.pipeline.scheduler, RectifiedFlow, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            states, pooled = cond["states"].to(dtype), cond["pooled"].to(dtype)
            output: Tensor = backbone(x_t.to(dtype), states, pooled, t, return_dict=False)[0]
            return output

        return call

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        """The image's feed-forward in the middle: a block puts out text as well, and that first."""
        blocks: Any = backbone.transformer_blocks
        layer: nn.Module = blocks[(len(blocks) - 1) // 2].ff
        return layer

    def head(self) -> nn.Module:
        config = self.pipeline.transformer.config
        return TokenHead(config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size)

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        both: Any = backbone.time_text_embed
        layer = both.timestep_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def call(self) -> dict[str, Any]:
        """The length of T5's text."""
        return (
            {} if self.pipeline.tokenizer_3 is None else {"max_sequence_length": window(self.pipeline, self.pipeline.tokenizer_3)}
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states and pooled text, as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder.parameters()).device
        options = {"device": device, "do_classifier_free_guidance": False, **self.call}
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, **options)
        return {"states": states, "pooled": pooled}

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)
