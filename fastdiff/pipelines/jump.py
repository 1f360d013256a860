"""The folder of a student that is told how far each of its calls jumps: a stock pipeline.

The network is told through the guidance embedding that the stock pipeline feeds with its ``guidance_scale``. SDXL's call has to say
that scale anyway and says the jump. A bare call of ``StableDiffusionPipeline`` says 7.5: on the way out the embedding is turned
(``guidance_embedding.rebased``) so that this very number says the jump of the student's own steps, and a bare call is right; beside
it lie the other jumps, which the card names.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.models.families.stable_diffusion import StableDiffusion
from fastdiff.models.guidance_embedding import guidance_width, rebased
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.flow import schedule_of

_CARD = """

`guidance_scale` guides nothing here: it says how much of the path a call jumps, the default {default:g} that of these steps. For K
calls under another scheduler, on K even times from the last one: `guidance_scale={default:g} + {unit:g} * (1 / K - {share:g})`."""


@dataclass(frozen=True)
class JumpSchedule(Schedule):
    """Of a student that is told ``1 + unit / K`` for each of its K calls, and whose pipeline says ``default`` in a bare call."""

    unit: float = 0.0
    default: float = 0.0

    def components(self, network: Any) -> dict[str, Any]:
        if guidance_width(network) is not None:
            network = rebased(network, 1 + self.unit / len(self.times), self.default)
        return super().components(network)

    def card(self) -> dict[str, str]:
        card, share = super().card(), 1 / len(self.times)
        return card | {"schedule": card["schedule"] + _CARD.format(default=self.default, unit=self.unit, share=share)}


def jump_schedule(teacher: Teacher, times: list[int] | list[float], sampler: str, unit: float) -> Schedule:
    """That of a student of ``teacher``; without a pipeline its caller says the jump."""
    if type(teacher.family) is not StableDiffusion:
        return schedule_of(teacher, times, sampler, guidance_scale=1 + unit / len(times))
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(type(teacher.pipeline).__call__).parameters
    return JumpSchedule(times, sampler, unit=unit, default=float(parameters["guidance_scale"].default))
