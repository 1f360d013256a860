"""``Denoiser``: a network with its process and prediction type, whose output is converted to x0 exactly once.

>>> denoiser = Denoiser(network, process, "epsilon")       # network(x_t, network_time, cond) -> Tensor like x_t
>>> prediction = denoiser(x_t, t, cond)                    # a Prediction: .x0, .eps, .score, .v
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.guidance import guide
from fastdiff.diffusion.prediction import Prediction, x0_from_output
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.models.condition import concat

Network = Callable[[Tensor, Tensor, Any], Tensor]


class Denoiser:
    """``denoiser(x_t, t, cond) -> Prediction`` for x_t [B, ...], t [B] and whatever ``cond`` the network takes."""

    def __init__(self, network: Network, process: NoiseProcess, prediction_type: str) -> None:
        self.network, self.process, self.prediction_type = network, process, prediction_type

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        output = self.network(x_t, self.process.network_time(t), cond)
        return Prediction(x_t, t, x0_from_output(output, x_t, t, self.process, self.prediction_type), self.process)

    def guided(self, x_t: Tensor, t: Tensor, cond: Any, null: Any, scale: float) -> Prediction:
        """Classifier-free guidance ``u + s (c - u)`` in one call of double batch; at s = 1 the null pass is not run.

        Guidance acts on x0, which commutes with every other parametrisation.
        """
        if scale == 1:
            return self(x_t, t, cond)
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), concat(null, cond))
        uncond, conditional = both.x0.chunk(2)
        return Prediction(x_t, t, guide(conditional, uncond, scale), self.process)
