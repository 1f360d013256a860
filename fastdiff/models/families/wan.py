"""Wan 2.1: a video transformer on the latents of a causal autoencoder, text by UMT5, rectified flow.

Network call ``transformer(x_t, 1000 t, states)``, predicting ``v = eps - x0``; samples are latents [C, F, h, w], less the
autoencoder's mean and over its deviation, channel by channel. A condition is text states [B, L, C]. Size and frames are those of
the pipeline's call by default (480, 832, 81) or of ``Teacher(size=...)``. The pipeline hands its scheduler no generators, so that
noise between a student's steps could not be repeated. Two networks by turns (Wan 2.2) and times by position are refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow
from fastdiff.models.denoiser import Network
from fastdiff.models.families.base import Family, process_of, window


class Wan(Family):
    """What the rest of fastdiff needs to know about a WanPipeline."""

    pipelines = ("WanPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"
    sizes = ("height", "width", "num_frames")
    gives_noise = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        if self.pipeline.config.get("boundary_ratio") is not None or self.pipeline.config.get("expand_timesteps"):
            raise ValueError(
                "it has two networks by turns, or times by position (Wan 2.2): a student of one network would learn from the "
                "wrong one below the boundary. Only Wan 2.1's kind is known here."
            )
        needs = "no rectified flow; Wan's network predicts the velocity of one"
        return process_of(self.pipeline.scheduler, RectifiedFlow, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            output: Tensor = backbone(x_t.to(dtype), t, cond.to(dtype), return_dict=False)[0]
            return output

        return call

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        both: Any = backbone.condition_embedder
        layer = both.time_embedder
        return layer, int(layer.linear_2.out_features)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        frames = (self.asked("num_frames") - 1) // time + 1
        return (self.pipeline.transformer.config.in_channels, frames, self.asked("height") // space, self.asked("width") // space)

    @property
    def call(self) -> dict[str, Any]:
        """The size, and the length of the text."""
        length = window(self.pipeline, self.pipeline.tokenizer)
        return {**{name: self.asked(name) for name in self.sizes}, "max_sequence_length": length}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts to text states [B, L, C], as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder.parameters()).device
        options = {"device": device, "max_sequence_length": self.call["max_sequence_length"]}
        states: Tensor = self.pipeline.encode_prompt(prompts, None, False, **options)[0]
        return states

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] to frames [B, F', 3, H, W] in [0, 1], float32."""
        vae = self.pipeline.vae
        mean, deviation = (
            torch.tensor(vae.config[name], device=latents.device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return frames(vae.decode((latents * deviation + mean).to(vae.dtype), return_dict=False)[0])


def frames(video: Tensor) -> Tensor:
    """An autoencoder's video [B, 3, F, H, W] in [-1, 1] as frames [B, F, 3, H, W] in [0, 1], float32."""
    return (video.float().transpose(1, 2) / 2 + 0.5).clamp(0, 1)
