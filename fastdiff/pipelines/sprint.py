"""Few-step students of SANA under TrigFlow: the stock ``SanaSprintPipeline`` with ``SCMScheduler``.

    x0 = cos t x - sin t sd F,     x' = cos t' x0 + sin t' sd noise,     F from the flow network at s = sin t / (sin t + cos t)

The pipeline makes that change of process itself, scales latents by the scheduler's sigma_data and back, and gives the network s
(no 1000) and 0.1 of the guidance scale (``models.sprint_network``). It begins at 1.5708, a little beyond pi / 2, and so does the
student. Its grids are two times, 1.5708 and 1.3, or evenly spaced ones; the paper's four, (1.5683, 1.3, 1.1, 0.6), cannot be
handed to it: in diffusers 0.42 ``SCMScheduler`` must be told the number of steps with them, and the pipeline leaves it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule

STOCK_END, STOCK_SECOND, STOCK_STEPS = 1.57080, 1.3, 2
"""The first and the second time of a bare call of the pipeline, which makes two."""
_CARD = """`scheduler/` is an `SCMScheduler`: {steps} of TrigFlow, at times {times} of pi/2 (noise) to 0 (image), with fresh noise
between them. The same network serves other numbers of steps (`num_inference_steps=n, intermediate_timesteps=None`; two without the
latter) and the scales of guidance that it was trained with."""


def sprint_times(steps: int) -> list[float]:
    """The pipeline's TrigFlow times of so many steps, falling: 1.5708 and 1.3 for two, else evenly spaced."""
    if steps == STOCK_STEPS:
        return [STOCK_END, STOCK_SECOND]
    return [STOCK_END * (steps - i) / steps for i in range(steps)]


def flow_time(angle: Tensor | float) -> Tensor:
    """``sin t / (sin t + cos t)``, the time of a rectified flow with the noise-to-signal ratio ``tan t``; float64."""
    t = torch.as_tensor(angle, dtype=torch.float64)
    return t.sin() / (t.sin() + t.cos())


@dataclass(frozen=True)
class SprintSchedule(Schedule):
    """That of a SANA student whose times are TrigFlow's; ``size`` is what its pipeline's call must be told anyway."""

    size: Mapping[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> dict[str, Any]:
        steps = len(self.times)
        grid = {"num_inference_steps": steps} | ({} if steps == STOCK_STEPS else {"intermediate_timesteps": None})
        return {**grid, "guidance_scale": self.guidance_scale, **self.size}

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        from diffusers import SanaSprintPipeline, SCMScheduler

        del teacher
        if list(self.times) != sprint_times(len(self.times)):
            raise ValueError(f"SanaSprintPipeline visits {sprint_times(len(self.times))} in so many steps.")
        return SanaSprintPipeline, SCMScheduler()

    def components(self, network: Any) -> dict[str, Any]:
        return {"transformer": network}

    def extras(self, teacher: Teacher, pipeline: Any, folder: Path, prompt: str) -> str:
        del teacher, pipeline, folder, prompt
        return ""

    def card(self) -> dict[str, str]:
        steps, times = len(self.times), ", ".join(f"{time:.5g}" for time in self.times)
        return super().card() | {"schedule": _CARD.format(steps="one step" if steps == 1 else f"{steps} steps", times=times)}


def sprint_schedule(teacher: Teacher, times: Sequence[float], **options: Any) -> SprintSchedule:
    """How the folder of a SANA student is called; ``options`` are those of ``Schedule``."""
    return SprintSchedule(times, "consistency", **options, size=teacher.family.call)
