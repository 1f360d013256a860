"""SANA: a linear-attention transformer on the latents of a deep-compression autoencoder, text by Gemma 2, rectified flow.

Network call ``transformer(x_t, states, 1000 t k, encoder_attention_mask=mask)``, k the network's ``timestep_scale``, predicting
``v = eps - x0``; latents are ``scaling_factor`` times the autoencoder's. One with a guidance embedding gets its condition's
scale. A condition holds text states [B, L, C] and their mask [B, L]. Prompts are encoded under the instruction that the
pipeline's call puts before them by default; the empty one without it, as its negative prompt is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow
from fastdiff.models.condition import split_guidance
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import PositionHead, TokenHead
from fastdiff.models.families.base import Family, decoded, default, process_of, window
from fastdiff.models.sprint_network import sprint_network


class Sana(Family):
    """What the rest of fastdiff needs to know about a SanaPipeline."""

    pipelines = ("SanaPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no rectified flow; SANA's network predicts the velocity of one"
        return process_of(self.pipeline.scheduler, RectifiedFlow, needs)

    def network(self, backbone: nn.Module) -> Network:
        config: Any = backbone.config

        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            text, scale = split_guidance(cond)
            states, mask = text["states"].to(dtype), text["mask"]
            told = {} if scale is None else {"guidance": scale.to(dtype) * config.guidance_embeds_scale}
            time = t * config.timestep_scale
            output: Tensor = backbone(x_t.to(dtype), states, time, encoder_attention_mask=mask, return_dict=False, **told)[0]
            return output[:, : x_t.shape[1]]  # a learned variance, if any, comes after the velocity

        return call

    def sprint_network(self) -> Callable[[nn.Module], nn.Module]:
        return sprint_network

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        blocks: Any = backbone.transformer_blocks
        block: nn.Module = blocks[(len(blocks) - 1) // 2]
        return block

    def head(self) -> nn.Module:
        config = self.pipeline.transformer.config
        return TokenHead(config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size)

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return list(backbone.transformer_blocks)  # type: ignore[arg-type]

    def block_heads(self) -> list[nn.Module]:
        config = self.pipeline.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        return [PositionHead(width) for _ in range(config.num_layers)]

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        time: Any = backbone.time_embed
        layer = getattr(time, "emb", time).timestep_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def call(self) -> dict[str, Any]:
        """The network's own size, and the window of a tokenizer that has one.

        The pipeline would draw 1024 pixels, by a table of sizes that knows four networks only; and it fills up 300 text states with
        masked ones, which change nothing and cost most of a small network's time.
        """
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        found = {"height": side, "width": side, "use_resolution_binning": False}
        length = window(self.pipeline, self.pipeline.tokenizer)
        return (
            found if length == default(self.pipeline.__call__, "max_sequence_length") else {**found, "max_sequence_length": length}
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states and mask, as the pipeline's call makes them; ``""`` is its negative prompt."""
        device = next(self.pipeline.text_encoder.parameters()).device
        options = {"device": device, "max_sequence_length": window(self.pipeline, self.pipeline.tokenizer)}
        instruction = default(self.pipeline.__call__, "complex_human_instruction")
        states, mask, *_ = self.pipeline.encode_prompt(prompts, False, complex_human_instruction=instruction, **options)
        if not all(prompts):
            null = self.pipeline.encode_prompt([""], False, **options)
            empty = torch.tensor([not prompt for prompt in prompts], device=device)
            states = torch.where(empty[:, None, None], null[0], states)
            mask = torch.where(empty[:, None], null[1], mask)
        return {"states": states, "mask": mask}

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)
