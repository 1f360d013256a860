"""``Denoiser``: a network with its process and prediction type, whose output is converted to x0 exactly once.

>>> denoiser = Denoiser(network, process, "epsilon")       # network(x_t, network_time, cond) -> Tensor like x_t
>>> prediction = denoiser(x_t, t, cond)                    # a Prediction: .x0, .eps, .score, .v
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.guidance import Scale, guide
from fastdiff.diffusion.prediction import Prediction, input_scale, x0_from_output
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess, expand
from fastdiff.models.condition import concat

Network = Callable[[Tensor, Tensor, Any], Tensor]


class Denoiser:
    """``denoiser(x_t, t, cond) -> Prediction`` for x_t [B, ...], t [B] and whatever ``cond`` the network takes."""

    def __init__(self, network: Network, process: NoiseProcess, prediction_type: str) -> None:
        self.network, self.process, self.prediction_type = network, process, prediction_type

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        scale = input_scale(self.process, t, self.prediction_type)
        x_in = x_t if scale is None else expand(scale, x_t) * x_t
        output = self.network(x_in, self.process.network_time(t), cond)
        if output.shape != x_t.shape:  # [B, 1] would be spread over x_t without a word
            raise ValueError(f"the network gave {tuple(output.shape)} for x_t {tuple(x_t.shape)}: expected the same shape.")
        return Prediction(x_t, t, x0_from_output(output, x_t, t, self.process, self.prediction_type), self.process)

    def continuous(self) -> "Denoiser":
        """The same network at real times between the rows of a discrete process; itself under any other."""
        if not isinstance(self.process, DiscreteVP):
            return self
        return Denoiser(self.network, self.process.continuous(), self.prediction_type)

    def guided(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Any,
        null: Any,
        scale: Scale,
        *,
        batched: bool = True,
        combine: Callable[[Tensor, Tensor, Scale], Tensor] = guide,
        on: str = "sample",
    ) -> Prediction:
        """Classifier-free guidance ``u + s (c - u)``; the null pass is not run when every scale is 1.

        Args:
            scale: a number, or one a sample [B].
            batched: one call of double batch; else two calls, which need half the memory.
            combine: another rule of ``diffusion.guidance``, its options bound with ``functools.partial``.
            on: the prediction type that the rule acts on. Plain guidance is the same on all of them; the others are not.
        """
        if not scale.is_meta and bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1:  # a plan's has no values
            return self(x_t, t, cond)
        if batched:
            uncond, conditional = self(torch.cat([x_t, x_t]), torch.cat([t, t]), concat(null, cond)).output(on).chunk(2)
        else:
            uncond, conditional = (self(x_t, t, c).output(on) for c in (null, cond))
        x0 = x0_from_output(combine(conditional, uncond, scale), x_t, t, self.process, on)
        return Prediction(x_t, t, x0, self.process)
