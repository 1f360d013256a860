"""Few-step students of flow teachers: the teacher's stock pipeline with ``FlowMatchEulerDiscreteScheduler`` at the student's times.

    ddim          x' = x + (t' - t) v                      the scheduler's Euler step, which is DDIM on a straight path
    consistency   x' = (1 - t') (x - t v) + t' noise       stochastic_sampling=True; SANA's pipeline hands it the call's generators

Such a pipeline takes 20 steps and guides unless told otherwise, and its folder cannot say so: the student's call carries both. Told
of K steps, the scheduler visits times of its own, on which two settings bear: with u falling evenly from 1, ``shift`` k makes
``t = k u / (1 + (k - 1) u)``, and ``shift_terminal`` then stretches 1 - t so that the last t is what it says. Both maps leave t = 1
in place and are projective, so what they reach is every grid from 1 on which 1 - t is a projective map of the step: evenly spaced
times, their shifts, and any three times or fewer. (This inversion is derived here.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.errors import UserError
from fastdiff.models.families.stable_diffusion import StableDiffusion
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.told import ToldSchedule

_CARD = """`scheduler/` is a `FlowMatchEulerDiscreteScheduler`, whose steps the call has to number: {steps}, at times {times}
of 1 (noise) to 0 (image), {between}. The student was trained for no other number and for no guidance."""


def schedule_of(teacher: Teacher, times: Sequence[int] | Sequence[float], sampler: str, **options: Any) -> Schedule:
    """How the folder of a student of ``teacher`` is called, which its process and pipeline decide.

    Args:
        options: those of ``Schedule``.

    Raises:
        UserError: the sampler draws noise between the steps, and the teacher's pipeline gives its scheduler no generators.
    """
    family = teacher.family
    if sampler == "consistency" and len(times) > 1 and teacher.pipeline is not None and not family.gives_noise:
        raise UserError(
            f"a {type(teacher.pipeline).__name__} hands its scheduler no generators: the noise that this student needs between its "
            f"{len(times)} steps would be another one at every call, whatever the seed. Take steps=1, or a method whose student "
            "samples without fresh noise (tdm, pcm, progressive)."
        )
    if teacher.pipeline is None or type(family) is StableDiffusion:
        return Schedule(times, sampler, **options)
    if not isinstance(teacher.process, RectifiedFlow):
        return ToldSchedule(times, sampler, **options, size=family.call, part=family.part)
    return FlowSchedule(times, sampler, **options, size=family.call, own_sigmas=family.gives_sigmas)


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """That of a student of a flow teacher; ``size`` is what its pipeline's call must be told anyway.

    ``own_sigmas`` is of a pipeline that tells the scheduler its sigmas, evenly spaced from 1 to 1 / K (FLUX).
    """

    size: Mapping[str, Any] = field(default_factory=dict)
    own_sigmas: bool = False

    @property
    def call(self) -> dict[str, Any]:
        return {"num_inference_steps": len(self.times), "guidance_scale": 1.0, **self.size}

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        rows = teacher.process.num_train_timesteps  # type: ignore[attr-defined]
        stochastic = self.sampler == "consistency" and len(self.times) > 1
        scheduler = flow_scheduler(self.times, num_train_timesteps=rows, stochastic=stochastic, own_sigmas=self.own_sigmas)
        return type(teacher.pipeline), scheduler

    def components(self, network: Any) -> dict[str, Any]:
        return {"transformer": network}

    def extras(self, teacher: Teacher, pipeline: Any, folder: Path, prompt: str) -> str:
        del teacher, pipeline, folder, prompt
        return ""

    def card(self) -> dict[str, str]:
        between = "with fresh noise between them" if self.sampler == "consistency" else "deterministic"
        steps, times = len(self.times), ", ".join(f"{time:.4g}" for time in self.times)
        return super().card() | {"schedule": _CARD.format(steps=steps, times=times, between=between)}


def flow_scheduler(
    times: Sequence[float], *, num_train_timesteps: int = 1000, stochastic: bool = False, own_sigmas: bool = False
) -> Any:
    """``FlowMatchEulerDiscreteScheduler`` whose ``len(times)`` steps are at ``times``, falling from 1.

    Args:
        own_sigmas: it will be told K sigmas evenly spaced from 1 to 1 / K, and not only their number.

    Raises:
        ValueError: no setting of its visits them.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    last = times[-1] if len(times) > 1 else None
    shift = (_told_shift if own_sigmas else _shift)([1 - time for time in times], num_train_timesteps) if last else 1.0
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=num_train_timesteps, shift=shift, shift_terminal=last, stochastic_sampling=stochastic
    )
    told: dict[str, Any] = {"sigmas": [1 - i / len(times) for i in range(len(times))]} if own_sigmas else {}
    scheduler.set_timesteps(len(times), **told)
    wanted = torch.tensor(times, dtype=torch.float64)
    if not (scheduler.sigmas[:-1] - wanted).abs().max() < 1e-6:
        made = [round(sigma, 6) for sigma in scheduler.sigmas[:-1].tolist()]
        raise ValueError(
            f"a FlowMatchEulerDiscreteScheduler of {len(times)} steps visits {made}, and the student {list(times)}: its grids "
            "begin at 1, pure noise, and are evenly spaced, or shifted from such a grid."
        )
    return scheduler


def _shift(y: Sequence[float], rows: int) -> float:
    """The ``shift`` k of a grid ``y_i = 1 - t_i``, i = 0..n; 1, an even grid, where no other makes it.

    With ``y_i ~ i / (1 - q i)``, the ratio of y_n to y_1 tells q, and the scheduler's is ``q n = (1 - 1/k) (T - 1) / (T - 1 + k)``,
    since its last u is T's last time, shifted once already: a quadratic equation for k.
    """
    n = len(y) - 1
    if n == 1 or not 0 < y[1] < y[-1]:
        return 1.0
    ratio = y[-1] / y[1]
    a = (ratio - n) / (ratio - 1) / (rows - 1)
    b = 1 - a * (rows - 1)
    if abs(a) < 1e-15 or (root := b * b - 4 * a) < 0:
        return 1.0
    return 2 / (b + math.sqrt(root))


def _told_shift(y: Sequence[float], rows: int) -> float:
    """The same where the scheduler is told ``u_i = 1 - i / K``: of ``y_i ~ (1 - u_i) / (1 + (k - 1) u_i)`` one ratio gives k."""
    del rows
    n, k = len(y) - 1, len(y)
    if n == 1 or not 0 < y[1] < y[-1]:
        return 1.0
    ratio, u_1, u_n = y[-1] / y[1], 1 - 1 / k, 1 / k
    return 1 + (ratio / k - n / k) / (u_1 * n / k - ratio * u_n / k)
