"""Laws known in closed form, as denoisers.

Mixture ``sum_k w_k N(m_k, v_k I)`` under ``x_t = a x0 + s eps``, with ``V_k = a^2 v_k + s^2``:

    pi_k(x) = softmax_k[log w_k - (d/2) log V_k - |x - a m_k|^2 / (2 V_k)]
    E[x0 | x_t] = sum_k pi_k (a v_k x + s^2 m_k) / V_k

A class condition restricts k to the components of the class. ``v_k = 0`` makes an empirical point set.
"""

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, expand


class GaussianMixture:
    """Exact denoiser of an isotropic mixture: ``mixture(x_t, t, labels) -> Prediction``, x_t [B, ...] flattening to [B, d].

    Args:
        means: [K, d].
        variances, weights: [K]; weights need not sum to one.
        labels: class of each component [K], or None when unconditional.
        process: the noise process.
    """

    def __init__(
        self, means: Tensor, variances: Tensor, weights: Tensor, process: NoiseProcess, *, labels: Tensor | None = None
    ) -> None:
        self.means, self.variances, self.log_weights = means, variances, (weights / weights.sum()).log()
        self.process, self.labels = process, labels

    @classmethod
    def ring(cls, process: NoiseProcess, *, modes: int = 8, radius: float = 2.0, std: float = 0.15) -> "GaussianMixture":
        """The ring toy: equal modes on a circle in the plane."""
        angle = torch.arange(modes, dtype=torch.float64) * 2 * torch.pi / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return cls(means, torch.full((modes,), std**2, dtype=torch.float64), torch.ones(modes, dtype=torch.float64), process)

    def _log_joint(self, x: Tensor, a: Tensor, s: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        spread = a.square() * self.variances.to(x) + s.square()
        distance = (x[:, None] - a[..., None] * self.means.to(x)).square().sum(-1)
        log_joint = self.log_weights.to(x) - 0.5 * x.shape[1] * (2 * torch.pi * spread).log() - distance / (2 * spread)
        if cond is not None and self.labels is not None:
            log_joint = log_joint.masked_fill(self.labels.to(cond.device) != cond[:, None], -torch.inf)
        return log_joint, spread

    def _coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t).expand(len(x))
        return expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Prediction:
        x = x_t.flatten(1)
        a, s = self._coefficients(x, t)
        log_joint, spread = self._log_joint(x, a, s, cond)
        gain = a * self.variances.to(x) / spread
        shift = (s.square() / spread)[..., None] * self.means.to(x)
        x0 = (log_joint.softmax(1)[..., None] * (gain[..., None] * x[:, None] + shift)).sum(1)
        return Prediction(x_t, torch.as_tensor(t).expand(len(x)), x0.reshape_as(x_t), self.process)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p_t(x_t) [B], up to the constant of the class weight when ``cond`` restricts the components."""
        x = x_t.flatten(1)
        return self._log_joint(x, *self._coefficients(x, t), cond)[0].logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` exact samples [n, d] of the law at t = 0."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.variances[k, None].sqrt() * noise
