"""A single Gaussian N(m, C): its probability-flow ODE in closed form.

With C = U diag(l) U^T and V_t = a_t^2 C + s_t^2 I, directions of U do not mix and, for every process,

    Phi_{t->u}(x) = a_u m + (V_u V_t^-1)^(1/2) (x - a_t m)                   the flow map
    f(x, t) = Phi_{t->end}(x), where a = 1 and s = 0                        the consistency function
    dx/dt = a' m + (a a' C + s s' I) V_t^-1 (x - a_t m)                     the velocity, which needs no sigma > 0
    w(x, t, u) = (x - Phi_{t->u}(x)) / (t - u)                              the mean velocity of MeanFlow (arXiv 2505.13447)

These are what consistency models, CTM, shortcut models and MeanFlow approximate, so each can be held against them without training.
"""

import torch
from torch import Tensor

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import NoiseProcess, expand


class Gaussian(GaussianMixture):
    """N(mean, covariance) as an exact denoiser with exact flow maps; times are [B] or scalars.

    Args:
        mean: [*shape], of d elements.
        covariance: [d, d], symmetric and positive semidefinite.
        process: the noise process.
    """

    basis: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor, process: NoiseProcess) -> None:
        one = torch.ones(1, dtype=torch.float64)
        super().__init__(mean.reshape(1, -1), None, one, process, covariances=covariance[None], shape=tuple(mean.shape))

    @classmethod
    def anisotropic(cls, process: NoiseProcess, *, d: int = 16, spread: float = 30.0, seed: int = 0) -> "Gaussian":
        """Correlated, of mean square 1 a dimension about a mean of standard normal entries.

        ``spread`` is the ratio of the largest to the smallest eigenvalue, between which they are spaced geometrically.
        """
        generator = torch.Generator().manual_seed(seed)
        axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
        values = torch.logspace(0, 1, d, base=spread, dtype=torch.float64)
        mean = torch.randn(d, generator=generator, dtype=torch.float64)
        return cls(mean, axes @ (values / values.mean()).diag() @ axes.T, process)

    def flow_map(self, x_t: Tensor, t: Tensor, u: Tensor | None) -> Tensor:
        """The state at times ``u`` of the ODE that passes through x_t [B, ...] at times ``t``; ``u = None`` is where x = x0.

        Between any two times, in either direction; not from sigma = 0 when the covariance is singular.
        """
        x = x_t.flatten(1)
        a_t, s_t = self._coefficients(x, t)
        a_u, s_u = (torch.ones_like(a_t), torch.zeros_like(s_t)) if u is None else self._coefficients(x, u)
        mean, values = self.means.to(x), self.variances.to(x)
        growth = ((a_u.square() * values + s_u.square()) / (a_t.square() * values + s_t.square())).sqrt()
        return (a_u * mean + self._along_axes(growth, x - a_t * mean)).reshape_as(x_t)

    def consistency(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The end of the trajectory through x_t: what one step of a perfect consistency model gives."""
        return self.flow_map(x_t, t, None)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """``dx/dt`` through x_t: ``prediction.velocity`` without its division by sigma."""
        x = x_t.flatten(1)
        a, s = self._coefficients(x, t)
        t = torch.as_tensor(t).expand(len(x))
        da, ds = expand(self.process.dalpha(t), x), expand(self.process.dsigma(t), x)
        mean, values = self.means.to(x), self.variances.to(x)
        rate = (a * da * values + s * ds) / (a.square() * values + s.square())
        return (da * mean + self._along_axes(rate, x - a * mean)).reshape_as(x_t)

    def mean_velocity(self, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The velocity averaged over the trajectory from ``t`` to ``u``; the velocity itself where u = t.

        Rounding grows as u nears t: by eps / |t - u| of the state.
        """
        t, u = torch.as_tensor(t).expand(len(x_t)), torch.as_tensor(u).expand(len(x_t))
        same = t == u
        span = torch.where(same, torch.ones_like(t, dtype=torch.float64), t.double() - u.double())
        mean = (x_t - self.flow_map(x_t, t, u)) / expand(span, x_t)
        return torch.where(same.to(x_t.device).reshape(-1, *[1] * (x_t.ndim - 1)), self.velocity(x_t, t), mean)

    def _along_axes(self, factors: Tensor, offset: Tensor) -> Tensor:
        """U diag(factors) U^T offset, row by row [B, d]."""
        basis = self.basis[0].to(offset)
        return (factors * (offset @ basis)) @ basis.T
