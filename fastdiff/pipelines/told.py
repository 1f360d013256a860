"""Few-step students of variance-preserving teachers whose pipeline has to be told their number of steps: SDXL, PixArt.

    consistency   the teacher's stock pipeline with LCMScheduler on exactly the student's times
    ddim          the same with DPMSolverMultistepScheduler of order 1, which is DDIM

Their pipelines take 50 or 20 steps and guide unless told otherwise, and a folder cannot say so: the student's call carries both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.models.teacher import Teacher
from fastdiff.models.tokenizers import add_slow_files
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.few_step import ddim_scheduler, lcm_scheduler

_CARD = """`scheduler/` is a `{scheduler}`, whose steps the call has to number: {steps}, at times {times}, {between}."""


@dataclass(frozen=True)
class ToldSchedule(Schedule):
    """That of such a student; ``size`` is what its pipeline's call must be told anyway, ``part`` its name of the network."""

    size: Mapping[str, Any] = field(default_factory=dict)
    part: str = "unet"

    @property
    def call(self) -> dict[str, Any]:
        return {"num_inference_steps": len(self.times), "guidance_scale": self.guidance_scale or 1.0, **self.size}

    @property
    def fresh(self) -> bool:
        """Whether the steps are LCM's: with noise between them, or only one."""
        return self.sampler == "consistency" or len(self.times) == 1

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        times = [int(time) for time in self.times]
        table: Tensor = teacher.process.alphas_cumprod  # type: ignore[attr-defined]
        if self.fresh:
            scheduler = lcm_scheduler(teacher.pipeline.scheduler.config, times, len(table), self.original_steps)
        else:
            scheduler = ddim_scheduler(table, times, teacher.prediction_type, asked=len(times))
        return type(teacher.pipeline), scheduler

    def components(self, network: Any) -> dict[str, Any]:
        return {self.part: network}

    def extras(self, teacher: Teacher, pipeline: Any, folder: Path, prompt: str) -> str:
        del teacher, prompt
        for name, part in pipeline.components.items():
            if "CLIPTokenizer" in type(part).__name__:
                add_slow_files(folder / name)
        return ""

    def card(self) -> dict[str, str]:
        scheduler = "LCMScheduler" if self.fresh else "DPMSolverMultistepScheduler"
        between = "with fresh noise between them" if self.fresh else "deterministic"
        steps, times = len(self.times), ", ".join(map(str, self.times))
        return super().card() | {"schedule": _CARD.format(scheduler=scheduler, steps=steps, times=times, between=between)}
