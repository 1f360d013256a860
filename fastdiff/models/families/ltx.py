"""LTX-Video: a transformer on packed video latents, text by T5, rectified flow.

Network call ``transformer(packed, states, 1000 t, mask, num_frames, height, width, rope_interpolation_scale)``, predicting
``v = eps - x0``. Here samples are latents [C, F, h, w], less the autoencoder's mean, over its deviation and times its scale; the
network and the pipeline's ``latents`` have them packed, a position a token. A condition holds text states [B, L, C] and their mask
[B, L]. Size and frames are those of the pipeline's call by default (512, 704, 161 at 25 a second) or of ``Teacher(size=...)``. The
pipeline hands its scheduler no generators, so that noise between a student's steps could not be repeated.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow
from fastdiff.models.denoiser import Network
from fastdiff.models.families.base import Family, default, process_of, window
from fastdiff.models.families.wan import frames


class LTX(Family):
    """What the rest of fastdiff needs to know about an LTXPipeline."""

    pipelines = ("LTXPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"
    sizes = ("height", "width", "num_frames")
    gives_noise = False
    gives_sigmas = True

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        if self.pipeline.vae.config.timestep_conditioning:
            raise ValueError(
                "its autoencoder denoises while it decodes (timestep_conditioning), from noise that no sample of ours has: its "
                "pictures would not be the trainer's. Take a checkpoint with the plain autoencoder."
            )
        if self.pipeline.transformer.config.patch_size != 1 or self.pipeline.transformer.config.patch_size_t != 1:
            raise ValueError("its network has patches of more than one position: its tokens would be in another order than here.")
        needs = "no rectified flow; LTX's network predicts the velocity of one"
        return process_of(self.pipeline.scheduler, RectifiedFlow, needs)

    def network(self, backbone: nn.Module) -> Network:
        space, time = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        rope = (time / default(self.pipeline.__call__, "frame_rate"), space, space)

        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype, shape = next(backbone.parameters()).dtype, x_t.shape[2:]
            sizes = dict(zip(("num_frames", "height", "width"), shape, strict=True))
            options = {**sizes, "rope_interpolation_scale": rope, "return_dict": False}
            tokens = x_t.flatten(2).transpose(1, 2).to(dtype)
            output: Tensor = backbone(tokens, cond["states"].to(dtype), t, cond["mask"], **options)[0]
            return output.transpose(1, 2).unflatten(2, shape)

        return call

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        single: Any = backbone.time_embed
        layer = single.emb.timestep_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        space, time = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        count = (self.asked("num_frames") - 1) // time + 1
        return (self.pipeline.transformer.config.in_channels, count, self.asked("height") // space, self.asked("width") // space)

    @property
    def call(self) -> dict[str, Any]:
        """The size, and the length of the text."""
        length = window(self.pipeline, self.pipeline.tokenizer)
        return {**{name: self.asked(name) for name in self.sizes}, "max_sequence_length": length}

    def drawn_from(self, noise: Tensor) -> Tensor:
        return noise.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states and mask, as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder.parameters()).device
        options = {"device": device, "max_sequence_length": self.call["max_sequence_length"]}
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, None, False, **options)
        return {"states": states, "mask": mask}

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] to frames [B, F', 3, H, W] in [0, 1], float32."""
        vae = self.pipeline.vae
        mean, deviation = (value.view(1, -1, 1, 1, 1).to(latents) for value in (vae.latents_mean, vae.latents_std))
        own = latents * deviation / vae.config.scaling_factor + mean
        return frames(vae.decode(own.to(vae.dtype), None, return_dict=False)[0])
