"""LCM-LoRA: LCM as an adapter on the teacher's network, which any pipeline of its kind can load.

    x_u = DDIM step from x_t, teacher guided at one scale s
    L   = mean( sqrt((f(x_t, t) - sg f(x_u, u))^2 + c^2) - c )

Times, boundary and sampler: ``_latent``. Trained: LoRA of rank r and alpha r on attention, feed-forward, convolutions,
projections and time projections; no guidance embedding, and no average: the target is the student itself. Delivered: the merged
pipeline and, in the same folder, the adapter (``pipelines.lora``).
Luo et al., LCM-LoRA: A Universal Stable-Diffusion Acceleration Module (2023), arXiv 2311.05556.
Departures: x0 is the teacher's own stored result, not an image; one fixed scale, where diffusers' script draws w from a range that
the student is not told, and so learns a mean of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.pipelines.lora import export_adapter
from fastdiff.trainers._latent import LatentConsistency
from fastdiff.trainers.method import Batch, Calls, Delivered, Finished, Paper, Trial

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_OTHERS = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
_SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv")
_TRIAL = {
    "guidance_scale": 1.0,
    "steps": 1,
    "original_steps": 10,
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "lr": 5e-4,
}


@dataclass(kw_only=True)
class LCMLoRA(LatentConsistency):
    """Few-step student as a LoRA of the teacher; needs prompts only and samples with fresh noise between its calls."""

    info: ClassVar[Paper] = Paper(
        title="LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
        venue="arXiv",
        year=2023,
        arxiv="2311.05556",
        sheet="few_step_diffusion.md: Consistency family (LCM-LoRA)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"flow_map": 0.23, "sliced_w2": 0.2, "stray": 0.33}, max_steps=2000),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.19, "w2": 0.7, "axes": 0.5}, max_steps=2000),
    }

    guidance_scale: float = 7.5
    """Guidance of the teacher, 1 is off; the student is not guided."""
    rank: int = 64
    """Rank of the adapter; its alpha equals it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance_scale", "rank"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")

    @classmethod
    def name(cls) -> str:
        return "lcm-lora"

    def roles(self) -> dict[str, Role]:
        return {"student": adapter_role(self.rank, self.lr)}

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {"student": Calls(2, 1), "teacher": Calls(1 if self.guidance_scale == 1 else 2, 0)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return self.consistency(batch, roles, self.guidance_scale, target="student")

    def deliver(self, finished: Finished) -> Delivered:
        """The merged pipeline, and the adapter beside it."""
        delivered = super().deliver(finished)
        if finished.teacher.pipeline is not None:
            call = {"num_inference_steps": self.steps, **finished.teacher.family.call}
            told: dict[str, Any] = {"scheduler": "LCMScheduler", "call": call, "prompt": finished.prompts[0]}
            export_adapter(finished.teacher.pipeline, finished.adapter, finished.folder, **told)
        return delivered


def adapter_role(rank: int, lr: float = 0.0, *, follows: bool = False) -> Role:
    """An adapter of the sheet's layers with alpha equal to its rank: the student's, or one that follows it."""
    train: Literal["lora", "lora-average"] = "lora-average" if follows else "lora"
    layers = (*_ATTENTION, *_OTHERS, *_SAMPLERS)
    return Role(train=train, lr=lr, weight_decay=0.01, rank=rank, lora_alpha=float(rank), lora_targets=layers)
