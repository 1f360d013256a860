"""PixArt-alpha and PixArt-Sigma: a transformer on KL latents, text by T5, VP process.

Network call ``transformer(x_t, states, t, added_cond_kwargs, encoder_attention_mask=mask)``, integer t, whose output may have a
learned variance behind the prediction. A condition holds text states [B, L, C] and their mask [B, L]. A network of alpha at 1024
pixels is also told the side of the image and its ratio, as the pipeline's call tells it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import DiscreteVP, NoiseProcess
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import TokenHead
from fastdiff.models.families.base import Family, decoded, default, process_of, window


class PixArt(Family):
    """What the rest of fastdiff needs to know about a PixArtAlphaPipeline or a PixArtSigmaPipeline."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no variance-preserving process; PixArt's network takes the integer times of one"
        return process_of(self.pipeline.scheduler, DiscreteVP, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            added = self._sizes(len(x_t), x_t.device, dtype)
            options = {"added_cond_kwargs": added, "encoder_attention_mask": cond["mask"], "return_dict": False}
            output: Tensor = backbone(x_t.to(dtype), cond["states"].to(dtype), t, **options)[0]
            return output[:, : x_t.shape[1]]

        return call

    def _sizes(self, n: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        if "Sigma" in type(self.pipeline).__name__ or self.latent_shape[-1] != 128:
            return {"resolution": None, "aspect_ratio": None}
        told = {"resolution": [[side, side]], "aspect_ratio": [[1.0]]}
        return {key: torch.tensor(value, device=device, dtype=dtype).repeat(n, 1) for key, value in told.items()}

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        blocks: Any = backbone.transformer_blocks
        block: nn.Module = blocks[(len(blocks) - 1) // 2]
        return block

    def head(self) -> nn.Module:
        config = self.pipeline.transformer.config
        return TokenHead(config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size)

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        single: Any = backbone.adaln_single
        layer = single.emb.timestep_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def call(self) -> dict[str, Any]:
        """The network's own size, which the pipeline would look up in a table of four, and the length of the text."""
        side = self.latent_shape[-1] * self.pipeline.vae_scale_factor
        length = window(self.pipeline, self.pipeline.tokenizer)
        return {"height": side, "width": side, "use_resolution_binning": False, "max_sequence_length": length}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states and mask, as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder.parameters()).device
        clean = default(self.pipeline.__call__, "clean_caption")
        options = {"device": device, "max_sequence_length": self.call["max_sequence_length"], "clean_caption": clean}
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"states": states, "mask": mask}

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)
