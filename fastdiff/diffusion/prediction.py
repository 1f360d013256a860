"""What a denoiser says about ``x_t``, stored once as x0 and read as anything.

With a = alpha(t), s = sigma(t), rho^2 = a^2 + s^2:

    eps   = (x_t - a x0) / s             x0 = (x_t - s eps) / a
    score = (a x0 - x_t) / s^2           x0 = (x_t + s^2 score) / a          (Tweedie)
    v     = a eps - s x0                 x0 = (a x_t - s v) / rho^2          (Salimans & Ho, arXiv 2202.00512)

Affine maps at fixed (x_t, t), so guidance may be applied on any of them.
"""

from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.process import NoiseProcess, expand


@dataclass(frozen=True)
class Prediction:
    """The prediction ``x0`` [B, ...] made from ``x_t`` [B, ...] at times ``t`` [B] of ``process``."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    process: NoiseProcess

    @property
    def alpha(self) -> Tensor:
        """alpha(t), shaped to broadcast over x0."""
        return expand(self.process.alpha(self.t), self.x0)

    @property
    def sigma(self) -> Tensor:
        """sigma(t), shaped to broadcast over x0."""
        return expand(self.process.sigma(self.t), self.x0)

    @property
    def eps(self) -> Tensor:
        return (self.x_t - self.alpha * self.x0) / self.sigma

    @property
    def score(self) -> Tensor:
        return (self.alpha * self.x0 - self.x_t) / self.sigma.square()

    @property
    def v(self) -> Tensor:
        return self.alpha * self.eps - self.sigma * self.x0


def x0_from_output(output: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, prediction_type: str) -> Tensor:
    """A network's output as x0; ``prediction_type`` is "epsilon", "v_prediction" or "sample", as diffusers names them.

    Computed in float32 or better: at t = T-1 of Stable Diffusion, 1/alpha = 14.6 magnifies rounding.
    """
    if output.itemsize < 4:
        output = output.float()
    x_t = x_t.to(output.dtype)
    alpha, sigma = expand(process.alpha(t), output), expand(process.sigma(t), output)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())
    if prediction_type == "sample":
        return output
    raise ValueError(f"unknown prediction type {prediction_type!r}: expected epsilon, v_prediction or sample.")


def output_from_x0(x0: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, prediction_type: str) -> Tensor:
    """The inverse of ``x0_from_output``: what a network of that type must put out for this x0."""
    prediction = Prediction(x_t, t, x0, process)
    outputs = {"epsilon": prediction.eps, "v_prediction": prediction.v, "sample": x0}
    if prediction_type not in outputs:
        raise ValueError(f"unknown prediction type {prediction_type!r}: expected one of {sorted(outputs)}.")
    return outputs[prediction_type]
