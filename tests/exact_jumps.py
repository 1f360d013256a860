"""A student that jumps exactly: the flow map of a Gaussian in closed form, told how far."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.matching import match_state
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess, RectifiedFlow, expand
from fastdiff.models.condition import split_guidance
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers._jumps import FLOW, UNIT, Places

LAW = Gaussian.anisotropic(laws.process(), d=4, spread=5.0)
PROCESSES: dict[str, Callable[[], NoiseProcess]] = {"vp": laws.process, "flow": RectifiedFlow}


class ExactJump(Denoiser):
    """x0 with which the jump that it is told ends on the exact trajectory: ``x_t - t u`` in flow time, u the mean velocity."""

    def __init__(self, process: NoiseProcess, offset: Tensor | float = 0.0) -> None:
        super().__init__(lambda x_t, t, cond: x_t, process, "sample")
        self.law, self.places, self.offset = LAW.under(FLOW), Places(process), offset

    def continuous(self) -> "ExactJump":
        process = self.process
        return ExactJump(process.continuous(), self.offset) if isinstance(process, DiscreteVP) else self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        duration = (split_guidance(cond)[1] - 1) / UNIT
        x, s = match_state(x_t.double(), t, self.process, FLOW)
        r = self.places.time((self.places.of(s) - duration).clamp(min=0))
        r = torch.where(duration.abs() < 1e-9, s, r)
        x0 = x - expand(s, x) * (self.law.mean_velocity(x, s, r) + self.offset)
        return Prediction(x_t, t, x0, self.process)


def exact_teacher(process: NoiseProcess) -> Teacher:
    """The law itself, with a small network that students start from."""
    kind = "flow_prediction" if isinstance(process, RectifiedFlow) else "v_prediction"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = TimeMLP(4, hidden=32, octaves=3, time_scale=1000.0)
    return Teacher.from_module(network, process, kind, shape=(4,), law=LAW.under(process))
