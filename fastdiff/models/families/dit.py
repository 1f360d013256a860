"""DiT: a class-conditional transformer on KL latents, VP process.

Network call ``transformer(x_t, t, class_labels)``, integer t, whose output may have a learned variance behind the prediction.
Prompts are class numbers as text; the empty one is class 1000, the null class of the pipeline. The pipeline draws its first noise
itself, from its call's generators, and hands them no further.
"""

from typing import Any

from torch import Tensor, nn

from fastdiff.diffusion.process import DiscreteVP, NoiseProcess
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import TokenHead
from fastdiff.models.families.base import Family, class_numbers, decoded, process_of

NULL_CLASS = 1000


class DiT(Family):
    """What the rest of fastdiff needs to know about a DiTPipeline."""

    pipelines = ("DiTPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    part = "transformer"
    gives_noise = False
    takes_latents = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def process(self) -> tuple[NoiseProcess, str]:
        needs = "no variance-preserving process; DiT's network takes the integer times of one"
        return process_of(self.pipeline.scheduler, DiscreteVP, needs)

    def network(self, backbone: nn.Module) -> Network:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            dtype = next(backbone.parameters()).dtype
            output: Tensor = backbone(x_t.to(dtype), t, cond, return_dict=False)[0]
            return output[:, : x_t.shape[1]]

        return call

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        blocks: Any = backbone.transformer_blocks
        block: nn.Module = blocks[(len(blocks) - 1) // 2]
        return block

    def head(self) -> nn.Module:
        config = self.pipeline.transformer.config
        return TokenHead(config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def encode(self, prompts: list[str]) -> Tensor:
        """Class numbers [B]; of the empty prompt the null class."""
        count = int(self.pipeline.transformer.config.num_embeds_ada_norm)
        return class_numbers(prompts, count, null=NULL_CLASS).to(next(self.backbone.parameters()).device)

    def decode(self, latents: Tensor) -> Tensor:
        return decoded(self.pipeline.vae, latents)
