"""What a denoiser says about ``x_t``, stored once as x0 and read as anything.

With a = alpha(t), s = sigma(t), a', s' their time derivatives, rho^2 = a^2 + s^2, W = a s' - s a', d = sigma_data and
q^2 = a^2 d^2 + s^2:

    epsilon           eps   = (x_t - a x0) / s               x0 = (x_t - s eps) / a
    score             score = (a x0 - x_t) / s^2             x0 = (x_t + s^2 score) / a          (Tweedie)
    v_prediction      v     = a eps - s x0                   x0 = (a x_t - s v) / rho^2          (Salimans & Ho, arXiv 2202.00512)
    flow_prediction   u     = a' x0 + s' eps                 x0 = (s' x_t - s u) / W             the path's velocity dx/dt
    edm               F     = (x0 - c x_t) q / (s d)         x0 = c x_t + (s d / q) F            c = a d^2 / q^2
    trigflow          F     = (c x_t - x0) q / (s d)         x0 = c x_t - (s d / q) F            the other sign

Affine maps at fixed (x_t, t), so guidance may be applied on any of them. The last two are written for any process; under EDM
and TrigFlow they are the papers' own.
"""

from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.process import NoiseProcess, expand

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "score", "edm", "trigflow")


@dataclass(frozen=True)
class Prediction:
    """The prediction ``x0`` [B, ...] made from ``x_t`` [B, ...] at times ``t`` [B] of ``process``."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    process: NoiseProcess

    def _at(self, coefficient: Tensor) -> Tensor:
        return expand(coefficient, self.x0)

    @property
    def alpha(self) -> Tensor:
        """alpha(t), shaped to broadcast over x0."""
        return self._at(self.process.alpha(self.t))

    @property
    def sigma(self) -> Tensor:
        """sigma(t), shaped to broadcast over x0."""
        return self._at(self.process.sigma(self.t))

    @property
    def eps(self) -> Tensor:
        return (self.x_t - self.alpha * self.x0) / self.sigma

    @property
    def score(self) -> Tensor:
        return (self.alpha * self.x0 - self.x_t) / self.sigma.square()

    @property
    def v(self) -> Tensor:
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def velocity(self) -> Tensor:
        """``u = dx/dt`` along the probability-flow ODE through x_t."""
        return self._at(self.process.dalpha(self.t)) * self.x0 + self._at(self.process.dsigma(self.t)) * self.eps

    @property
    def trigflow(self) -> Tensor:
        """F of TrigFlow, ``x0 = c x_t - (s d / q) F``."""
        skip, out = edm_coefficients(self.process, self.t)
        return (self._at(skip) * self.x_t - self.x0) / self._at(out)

    def output(self, prediction_type: str) -> Tensor:
        """What a network of that type must put out.

        Raises:
            ValueError: no such type.
        """
        if prediction_type == "sample":
            return self.x0
        if prediction_type == "edm":
            return -self.trigflow
        names = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "velocity"}
        value: Tensor = getattr(self, names.get(_known(prediction_type), prediction_type))
        return value


def edm_coefficients(process: NoiseProcess, t: Tensor) -> tuple[Tensor, Tensor]:
    """``c_skip = a d^2 / q^2`` and ``c_out = s d / q`` at times t, float64."""
    a, s, d = process.alpha(t), process.sigma(t), process.sigma_data
    q2 = a.square() * d**2 + s.square()
    return a * d**2 / q2, s * d / q2.sqrt()


def input_scale(process: NoiseProcess, t: Tensor, prediction_type: str) -> Tensor | None:
    """What a network multiplies x_t by: ``c_in = 1 / q`` for the EDM and TrigFlow types, None (nothing) for all others."""
    if _known(prediction_type) not in {"edm", "trigflow"}:
        return None
    return 1 / (process.alpha(t).square() * process.sigma_data**2 + process.sigma(t).square()).sqrt()


def x0_from_output(output: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, prediction_type: str) -> Tensor:
    """A network's output as x0; ``prediction_type`` is one of ``PREDICTION_TYPES``, named as diffusers names them.

    Computed in float32 or better: at t = T-1 of Stable Diffusion, 1/alpha = 14.6 magnifies rounding.

    Raises:
        ValueError: no such type.
    """
    if output.itemsize < 4:
        output = output.float()
    x_t = x_t.to(output.dtype)

    def at(coefficient: Tensor) -> Tensor:
        return expand(coefficient, output)

    a, s = process.alpha(t), process.sigma(t)
    if _known(prediction_type) == "sample":
        return output
    if prediction_type == "epsilon":
        return (x_t - at(s) * output) / at(a)
    if prediction_type == "score":
        return (x_t + at(s.square()) * output) / at(a)
    if prediction_type == "v_prediction":
        return (at(a) * x_t - at(s) * output) / at(a.square() + s.square())
    if prediction_type == "flow_prediction":
        ds = process.dsigma(t)
        wronskian = a * ds - s * process.dalpha(t)
        return at(ds / wronskian) * x_t - at(s / wronskian) * output
    skip, out = edm_coefficients(process, t)
    return at(skip) * x_t + at(out if prediction_type == "edm" else -out) * output


def output_from_x0(x0: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, prediction_type: str) -> Tensor:
    """The inverse of ``x0_from_output``: what a network of that type must put out for this x0."""
    return Prediction(x_t, t, x0, process).output(prediction_type)


def convert(output: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, source: str, target: str) -> Tensor:
    """One parametrisation's output as another's, at the same (x_t, t); nothing is computed when they are the same."""
    if source == target:
        return output
    return output_from_x0(x0_from_output(output, x_t, t, process, source), x_t, t, process, target)


def _known(prediction_type: str) -> str:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"unknown prediction type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}.")
    return prediction_type
