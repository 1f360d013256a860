"""Few-step students of variance-preserving teachers whose pipeline has to be told their number of steps: SDXL, PixArt, DiT, DDPM.

    consistency   the teacher's stock pipeline with LCMScheduler on exactly the student's times
    tcd           the same with TCDScheduler
    ddim          the same with DPMSolverMultistepScheduler of order 1, which is DDIM; of a DDPM, DDIMPipeline with DDIMScheduler

Their pipelines take 50 or 20 steps and guide unless told otherwise, and a folder cannot say so: the student's call carries both.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.models.teacher import Teacher
from fastdiff.models.tokenizers import add_slow_files
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.few_step import checked, ddim_scheduler, lcm_scheduler, tcd_scheduler

_CARD = """`scheduler/` is a `{scheduler}`, whose steps the call has to number: {steps}, at times {times}, {between}."""


@dataclass(frozen=True)
class ToldSchedule(Schedule):
    """That of such a student; ``size`` is what its pipeline's call must be told anyway, ``part`` its name of the network."""

    size: Mapping[str, Any] = field(default_factory=dict)
    part: str = "unet"

    @property
    def call(self) -> dict[str, Any]:
        eta = {"eta": self.eta} if self.sampler == "tcd" else {}
        return {"num_inference_steps": len(self.times), "guidance_scale": self.guidance_scale or 1.0, **eta, **self.size}

    @property
    def fresh(self) -> bool:
        """Whether the steps are LCM's: with noise between them, or only one."""
        return self.sampler == "consistency" or (len(self.times) == 1 and self.sampler != "tcd")

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        times = [int(time) for time in self.times]
        table: Tensor = teacher.process.alphas_cumprod  # type: ignore[attr-defined]
        if self.sampler == "tcd":
            scheduler = tcd_scheduler(teacher.pipeline.scheduler.config, times, len(table), self.original_steps or len(times))
        elif self.fresh:
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
        if self.sampler == "tcd":
            return super().card()
        scheduler = "LCMScheduler" if self.fresh else "DPMSolverMultistepScheduler"
        between = "with fresh noise between them" if self.fresh else "deterministic"
        steps, times = len(self.times), ", ".join(map(str, self.times))
        return super().card() | {"schedule": _CARD.format(scheduler=scheduler, steps=steps, times=times, between=between)}


@dataclass(frozen=True)
class PixelSchedule(ToldSchedule):
    """That of a student of a DDPM, which knows no guidance; a DDIMPipeline runs DDIMScheduler whatever it is given."""

    @property
    def call(self) -> dict[str, Any]:
        return {"num_inference_steps": len(self.times)}

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        from diffusers import DDIMPipeline, DDIMScheduler

        names = inspect.signature(DDIMScheduler.__init__).parameters
        own = {key: value for key, value in teacher.pipeline.scheduler.config.items() if key in names}
        exact = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
        scheduler = DDIMScheduler(**{**own, **exact, "rescale_betas_zero_snr": False})
        scheduler.set_timesteps(len(self.times))
        return DDIMPipeline, checked(scheduler, [int(time) for time in self.times])

    def card(self) -> dict[str, str]:
        steps, times = len(self.times), ", ".join(map(str, self.times))
        options = {"scheduler": "DDIMScheduler", "between": "deterministic", "steps": steps, "times": times}
        return super().card() | {"schedule": _CARD.format(**options)}
