"""A few network calls by a bare ``pipeline(prompt)``, with stock diffusers classes only; one call is ``one_step``'s.

    consistency   LatentConsistencyModelPipeline, whose default is 4 steps, with LCMScheduler on exactly the student's times
    ddim          StableDiffusionPipeline with DPMSolverMultistepScheduler of order 1, which is DDIM
    tcd           StableDiffusionPipeline with TCDScheduler, which has to be called with its steps and its eta

``StableDiffusionPipeline`` asks for 50 steps, and its folder cannot say otherwise. The DPM scheduler drops every time above a clip
of its log-SNR: told of 50 / K times more training times than there are, trailing spacing keeps exactly the K that the student was
trained at. The table of betas is the teacher's own up to the largest of them. Asking such a folder for another number of steps
gives another number of times.

No bare call makes TCD's steps: ``TCDScheduler`` has no eta in its config and 0.3 in its step, for which StableDiffusionPipeline
puts its own default of 0, and LatentConsistencyModelPipeline None, at which that scheduler fails.
"""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.families import FAMILIES

BARE_STEPS = 50
"""What StableDiffusionPipeline takes without being asked."""
_PLAIN = {"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False}
LCM_STEPS = 4
"""What LatentConsistencyModelPipeline takes."""


def own_call(pipeline: Any) -> dict[str, Any]:
    """What a pipeline must be told besides the prompt: ``call`` in the ``fastdiff.json`` of the folder it is of.

    Without that note, what its family's call needs to draw at all; and of LCM folders, whose scheduler was distilled on as many
    times as it shall visit, their number of steps: on diffusers' own 50 of them a bare call is left as it is.
    """
    folder = pipeline.config.get("_name_or_path")
    note = Path(folder or "", "fastdiff.json")
    if folder and note.is_file():
        call: dict[str, Any] | None = json.loads(note.read_text(encoding="utf-8")).get("call")
        if call is not None:
            return call
    own: dict[str, Any] = next((family(pipeline).call for family in FAMILIES if type(pipeline).__name__ in family.pipelines), {})
    if own:
        return own
    trained = getattr(pipeline, "scheduler", None) and pipeline.scheduler.config.get("original_inference_steps")
    lcm = type(pipeline).__name__ == "LatentConsistencyModelPipeline"
    return {"num_inference_steps": int(trained)} if lcm and trained not in {None, LCM_STEPS, BARE_STEPS} else {}


def lcm_scheduler(config: Any, times: Sequence[int], num_train_timesteps: int, original_steps: int | None = None) -> Any:
    """``LCMScheduler`` whose grid of ``len(times)`` steps is ``times``.

    Args:
        original_steps: of the grid that the student was distilled on; None is ``times`` itself, K of them.

    Raises:
        ValueError: times are not ``solvers.lcm_times(K, original_steps)``; without a grid, ``T - 1 - k T / K``.
    """
    from diffusers import LCMScheduler

    given = {"original_inference_steps": original_steps or len(times), "num_train_timesteps": num_train_timesteps}
    scheduler = rescheduled(LCMScheduler, config, **given, **_PLAIN)
    scheduler.set_timesteps(len(times))
    return checked(scheduler, times)


def rescheduled(kind: Any, config: Any, **options: Any) -> Any:
    """A scheduler of class ``kind`` with leading spacing under the schedule of another scheduler's config.

    Not by ``from_config``: it leaves out every value that was a default where it comes from, and ``kind`` has others.
    """
    names = inspect.signature(kind.__init__).parameters
    return kind(**{**{key: value for key, value in config.items() if key in names}, "timestep_spacing": "leading", **options})


def tcd_scheduler(config: Any, times: Sequence[int], num_train_timesteps: int, original_steps: int) -> Any:
    """``TCDScheduler`` on a grid of ``original_steps`` times, whose ``len(times)`` steps are ``times``; it ends at row 0.

    Raises:
        ValueError: times are not ``solvers.lcm_times(K, original_steps)``.
    """
    from diffusers import TCDScheduler

    given = {"original_inference_steps": original_steps, "num_train_timesteps": num_train_timesteps}
    scheduler = rescheduled(TCDScheduler, config, **given, **_PLAIN)
    scheduler.set_timesteps(len(times))
    return checked(scheduler, times)


def ddim_scheduler(alphas_cumprod: Tensor, times: Sequence[int], prediction_type: str, *, asked: int = BARE_STEPS) -> Any:
    """A stock scheduler that makes DDIM steps through ``times`` to x0 when it is asked for ``asked`` steps.

    Args:
        alphas_cumprod: the teacher's table [T].

    Raises:
        ValueError: times are not ``L - 1 - k L / K`` for some L, or K does not divide ``asked`` L.
    """
    from diffusers import DPMSolverMultistepScheduler

    last, k = times[0] + 1, len(times)
    if k > asked or (asked * last) % k:
        raise ValueError(f"times {list(times)} are not one of every {k} of {last}.")
    table = alphas_cumprod.double()[:last]
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    total = asked * last // k
    beyond = torch.full((total - last,), 0.01, dtype=torch.float64)
    options: dict[str, Any] = {
        "num_train_timesteps": total,
        "trained_betas": torch.cat([betas, beyond]).tolist(),
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "algorithm_type": "dpmsolver++",
        "solver_order": 1,
        "final_sigmas_type": "zero",
    }
    log_snr = DPMSolverMultistepScheduler(**options).lambda_t
    clip = float(log_snr[last - 1] + log_snr[last]) / 2 if total > last else -float("inf")
    scheduler = DPMSolverMultistepScheduler(**options, lambda_min_clipped=clip)
    scheduler.set_timesteps(asked)
    return checked(scheduler, times)


def checked(scheduler: Any, times: Sequence[int]) -> Any:
    """The scheduler, if its times are these; ``ValueError`` if not."""
    made = scheduler.timesteps.tolist()
    if made != list(times):
        raise ValueError(f"a {type(scheduler).__name__} of {len(times)} steps visits {made}, and the student {list(times)}.")
    return scheduler
