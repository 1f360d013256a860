"""FLUX.1: a transformer on packed KL latents, text by CLIP and T5, rectified flow; mostly with its guidance embedded.

Network call ``transformer(packed, states, pooled, t, img_ids, txt_ids, guidance)`` with t in [0, 1], predicting ``v = eps - x0``.
Here samples are latents [B, C, h, w]; the network and the pipeline's ``latents`` have them packed, 2 x 2 positions a token. A
condition holds text states [B, L, C] and pooled ones [B, P]. A network with embedded guidance is told the scale of the pipeline's
call, 3.5, always: its students have that too, and a method's own ``guidance_scale`` is guidance on top of it, mostly 1. The
pipeline hands its scheduler no generators, so that noise between a student's steps could not be repeated.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import TokenHead
from fastdiff.models.families.base import Family, decoded, default, process_of, window


class Flux(Family):
    """What the rest of fastdiff needs to know about a FluxPipeline."""

    pipelines = ("FluxPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"
    sizes = ("height", "width")
    gives_noise = False
    gives_sigmas = True

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no rectified flow; FLUX's network predicts the velocity of one"
        return process_of(self.pipeline.scheduler, RectifiedFlow, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype, (height, width) = next(backbone.parameters()).dtype, x_t.shape[-2:]
            states, pooled = cond["states"].to(dtype), cond["pooled"].to(dtype)
            places = positions(height // 2, width // 2, x_t.device, dtype)
            options = {"txt_ids": torch.zeros(states.shape[1], 3, device=x_t.device, dtype=dtype), "img_ids": places}
            if self._scale is not None:
                options["guidance"] = torch.full((len(x_t),), self._scale, device=x_t.device)
            output = backbone(pack(x_t).to(dtype), states, pooled, t / 1000, return_dict=False, **options)[0]
            return unpack(output, height, width)

        return call

    @property
    def _scale(self) -> float | None:
        """What the network is told."""
        embeds = self.pipeline.transformer.config.guidance_embeds
        return float(default(self.pipeline.__call__, "guidance_scale")) if embeds else None

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        """The image's feed-forward in the middle: a block puts out text as well, and that first."""
        blocks: Any = backbone.transformer_blocks
        layer: nn.Module = blocks[(len(blocks) - 1) // 2].ff
        return layer

    def head(self) -> nn.Module:
        config = self.pipeline.transformer.config
        _, height, width = self.latent_shape
        return TokenHead(config.num_attention_heads * config.attention_head_dim, (height // 2, width // 2))

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        both: Any = backbone.time_text_embed
        layer = both.timestep_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        height, width = (self.asked(name) // self.pipeline.vae_scale_factor for name in self.sizes)
        return (self.pipeline.transformer.config.in_channels // 4, height, width)

    def asked(self, name: str) -> int:
        return int(self.size.get(name, self.pipeline.default_sample_size * self.pipeline.vae_scale_factor))

    @property
    def call(self) -> dict[str, Any]:
        """The size, which the network does not know, the length of T5's text, and the embedded scale."""
        found = {
            **{name: self.asked(name) for name in self.sizes},
            "max_sequence_length": window(self.pipeline, self.pipeline.tokenizer_2),
        }
        return found if self._scale is None else {**found, "guidance_scale": self._scale}

    def drawn_from(self, noise: Tensor) -> Tensor:
        return pack(noise)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states and pooled text, as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder.parameters()).device
        options = {"device": device, "max_sequence_length": self.call["max_sequence_length"]}
        states, pooled, _ = self.pipeline.encode_prompt(prompts, None, **options)
        return {"states": states, "pooled": pooled}

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h w / 4, 4 C], row by row; h and w even."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for latents of that height and width."""
    b, _, channels = x.shape
    x = x.reshape(b, height // 2, width // 2, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def positions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(0, row, column) of each token [height width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(dtype)
