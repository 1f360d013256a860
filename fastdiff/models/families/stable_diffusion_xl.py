"""Stable Diffusion XL: Stable Diffusion's UNet with two text encoders and micro-conditions.

Network call ``unet(x_t, t, encoder_hidden_states, added_cond_kwargs={text_embeds, time_ids})``. A condition holds the text states
of both encoders [B, L, D], the pooled ones of the second [B, P], and the sizes (height, width, 0, 0, height, width) [B, 6] that the
pipeline's call says by default. The empty prompt is all zeros where the pipeline says so (``force_zeros_for_empty_prompt``).
"""

from typing import Any

import torch
from torch import Tensor

from fastdiff.models.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """What the rest of fastdiff needs to know about a StableDiffusionXLPipeline."""

    pipelines = ("StableDiffusionXLPipeline",)

    def inputs(self, cond: Any, dtype: torch.dtype) -> dict[str, Any]:
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["sizes"].to(dtype)}
        return {"encoder_hidden_states": cond["text"].to(dtype), "added_cond_kwargs": added}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to text states, pooled text and sizes, as the pipeline's call makes them."""
        device = next(self.pipeline.text_encoder_2.parameters()).device
        text, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            kept = torch.tensor([bool(prompt) for prompt in prompts], device=device)
            text, pooled = text * kept[:, None, None], pooled * kept[:, None]
        side = float(self.latent_shape[-1] * self.pipeline.vae_scale_factor)
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=device).repeat(len(prompts), 1)
        return {"text": text, "pooled": pooled, "sizes": sizes}
