"""Laws known in closed form, as denoisers.

Mixture ``sum_k w_k N(m_k, C_k)`` under ``x_t = a x0 + s eps``. With C_k = U_k diag(l_k) U_k^T, decomposed once, the component of
x_t has covariance ``V_k = a^2 C_k + s^2 I = U_k diag(a^2 l_k + s^2) U_k^T`` at every time:

    pi_k(x) = softmax_k[log w_k - log|2 pi V_k| / 2 - (x - a m_k)^T V_k^-1 (x - a m_k) / 2]
    E[x0 | x_t] = sum_k pi_k (m_k + a C_k V_k^-1 (x - a m_k))

A class condition restricts k to the components of the class and renormalises w. A guided prediction is the affine combination of
two of these and belongs to no law: it has no density. Parameters are kept in float64, and laws are evaluated in the dtype of x_t.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, expand

Mixture = TypeVar("Mixture", bound="GaussianMixture")


class GaussianMixture:
    """Exact denoiser of a mixture: ``mixture(x_t, t, cond) -> Prediction``, x_t [B, ...] flattening to [B, d].

    Everywhere ``cond`` is labels [B], int64, one label for all, or None; -1 and None are all components, and a law without
    labels ignores it.

    Args:
        means: [K, d].
        variances: [K] of isotropic components, [K, d] of diagonal ones, None when ``covariances`` is given.
        weights: [K], which need not sum to one.
        process: the noise process.
        covariances: [K, d, d], symmetric and positive semidefinite, instead of ``variances``.
        labels: class of each component [K], or None when unconditional.
        shape: that of one sample, (d,) unless given.

    Raises:
        ValueError: the covariances are not such, or sizes do not fit; when evaluated, a label that no component has, or
            sigma = 0 where a component has a direction of zero variance, and so no density.

    >>> from fastdiff.diffusion.process import EDM
    >>> ring = GaussianMixture.ring(EDM())
    >>> ring(torch.tensor([[1.9, 0.1]]), torch.tensor([0.002])).x0
    tensor([[1.9000, 0.1000]])
    """

    def __init__(
        self,
        means: Tensor,
        variances: Tensor | None,
        weights: Tensor,
        process: NoiseProcess,
        *,
        covariances: Tensor | None = None,
        labels: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.means, self.weights = means.double(), weights.double() / weights.double().sum()
        self.log_weights, self.labels, self.process = self.weights.log(), labels, process
        self.shape = tuple(means.shape[1:]) if shape is None else tuple(shape)
        self.basis: Tensor | None = None
        """[K, d, d] when components are neither isotropic nor diagonal: ``variances`` [K, d] are then along its columns."""
        if covariances is not None and variances is None:
            self.variances, self.basis = _decompose(covariances)
        elif variances is not None and covariances is None:
            self.variances = variances.double()
        else:
            raise ValueError("give either variances or covariances: both or neither leave the components' spread undefined.")
        k, d = means.shape
        if self.variances.shape not in {(k,), (k, d)} or weights.shape != (k,) or math.prod(self.shape) != d:
            raise ValueError(
                f"means [K, d] = {[k, d]} with spreads {list(self.variances.shape)}, weights {list(weights.shape)} and samples of "
                f"shape {self.shape}: spreads must be [K], [K, d] or [K, d, d], weights [K], and the shape must have d elements."
            )
        if (self.variances < 0).any():
            raise ValueError(f"variance {self.variances.min():.3g} is negative: densities and scores would be of no law.")
        self._singular = bool((self.variances == 0).any())

    @staticmethod
    def ring(process: NoiseProcess, *, modes: int = 8, radius: float = 2.0, std: float = 0.15) -> "GaussianMixture":
        """The ring toy: equal modes on a circle in the plane."""
        angle = torch.arange(modes, dtype=torch.float64) * 2 * torch.pi / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return GaussianMixture(means, torch.full((modes,), std**2, dtype=torch.float64), torch.ones(modes), process)

    @staticmethod
    def classes(process: NoiseProcess) -> "GaussianMixture":
        """Three classes in the plane of 3, 3 and 2 separate modes, all of unequal mass and spread: for masses recovered.

        The smallest mode has 2 % of the law and 4 % of its class; centres are at least 7 of the wider standard deviation apart.
        """
        label_x_y_std_weight = [
            (0, -2.0, 1.6, 0.15, 0.10),
            (0, -2.2, -0.4, 0.25, 0.06),
            (0, -0.4, 2.4, 0.10, 0.04),
            (1, 1.4, 1.8, 0.20, 0.05),
            (1, 2.4, 0.2, 0.12, 0.20),
            (1, 0.2, 0.5, 0.08, 0.05),
            (2, 0.0, -2.0, 0.30, 0.48),
            (2, 2.2, -1.6, 0.10, 0.02),
        ]
        table = torch.tensor(label_x_y_std_weight, dtype=torch.float64)
        return GaussianMixture(table[:, 1:3], table[:, 3].square(), table[:, 4], process, labels=table[:, 0].long())

    @staticmethod
    def images(process: NoiseProcess, *, modes: int = 5, seed: int = 0) -> "GaussianMixture":
        """Smooth images 1x8x8 of standard deviation 0.5: each mode varies along 6 directions, and by 0.05 along all others.

        Means and directions are of the lowest 4x4 cosine waves, amplitudes falling with frequency as those of photographs do.
        """
        generator = torch.Generator().manual_seed(seed)
        position = (torch.arange(8, dtype=torch.float64) + 0.5) * torch.pi / 8
        waves = (torch.arange(4)[:, None] * position).cos()
        waves = waves / waves.norm(dim=1, keepdim=True)
        frequency = torch.arange(4.0).square()
        smooth = torch.einsum("ix,jy->ijxy", waves, waves) / (1 + frequency[:, None] + frequency)[..., None, None]
        draw = torch.randn(modes, 7, 16, generator=generator, dtype=torch.float64) @ smooth.reshape(16, 64)
        means, factors = draw[:, 0], draw[:, 1:] / 6**0.5
        weights = 1 + torch.rand(modes, generator=generator, dtype=torch.float64)
        law = GaussianMixture(means, None, weights, process, covariances=factors.mT @ factors)
        scale = 0.25 / (law.moments()[1].diagonal().mean())
        covariances = scale * factors.mT @ factors + 0.05**2 * torch.eye(64, dtype=torch.float64)
        return GaussianMixture(scale.sqrt() * means, None, weights, process, covariances=covariances, shape=(1, 8, 8))

    def under(self: Mixture, process: NoiseProcess) -> Mixture:
        """The same law seen through another noise process."""
        law = copy.copy(self)
        law.process = process
        return law

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | int | None = None) -> Prediction:
        x = x_t.flatten(1)
        x0 = self._posterior(x, *self._coefficients(x, t), cond)[1]
        return Prediction(x_t, torch.as_tensor(t).expand(len(x)), x0.reshape_as(x_t), self.process)

    def log_density(self, x_t: Tensor, t: Tensor, cond: Tensor | int | None = None) -> Tensor:
        """log p_t(x_t | cond) [B]."""
        x = x_t.flatten(1)
        return self._posterior(x, *self._coefficients(x, t), cond)[0]

    def mode_of(self, x0: Tensor, cond: Tensor | int | None = None) -> Tensor:
        """The component [B] that most probably made each sample ``x0`` [B, ...] of the law at sigma = 0."""
        x = x0.flatten(1)
        one = x.new_ones(1, 1)
        return self._joint(x, one, 0 * one, cond)[0].argmax(1)

    def moments(self, cond: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of the law, or of one of its classes."""
        weights = self._log_prior(cond).exp().flatten()
        mean = weights @ self.means
        away = self.means - mean
        within = weights @ self._axes.expand_as(self.means) if self.basis is None else weights[:, None] * self.variances
        within = within.diag() if self.basis is None else torch.einsum("kde,ke,kfe->df", self.basis, within, self.basis)
        return mean, within + (weights[:, None] * away).mT @ away

    def sample(self, n: int, generator: torch.Generator, cond: Tensor | int | None = None) -> Tensor:
        """``n`` exact samples [n, *shape] of the law at sigma = 0, float64; ``cond`` is labels [n] or one label."""
        weights = self._log_prior(cond).exp()
        if weights.ndim == 1 or len(weights) == 1:
            k = torch.multinomial(weights.flatten(), n, replacement=True, generator=generator)
        else:
            k = torch.multinomial(weights, 1, generator=generator).flatten()
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        noise = self._axes[k].sqrt() * noise
        if self.basis is not None:
            noise = (self.basis[k] @ noise[..., None])[..., 0]
        return (self.means[k] + noise).reshape(n, *self.shape)

    @property
    def _axes(self) -> Tensor:
        """Variances along the components' axes, [K, 1] or [K, d]."""
        return self.variances if self.variances.ndim == 2 else self.variances[:, None]

    def _coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t).expand(len(x))
        return expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)

    def _log_prior(self, cond: Tensor | int | None) -> Tensor:
        """log w of all components [K], or given the class [B, K]."""
        if cond is None or self.labels is None:
            return self.log_weights
        asked = torch.as_tensor(cond).to(self.labels.device).reshape(-1, 1)
        allowed = (asked == self.labels) | (asked == -1)
        if not allowed.any(1).all():
            strange = sorted(set(asked[~allowed.any(1)].flatten().tolist()))
            raise ValueError(f"no component has label {strange}: the density would be zero and the score undefined (-1 is all).")
        return self.log_weights.masked_fill(~allowed, -torch.inf).log_softmax(1)

    def _joint(
        self, x: Tensor, a: Tensor, s: Tensor, cond: Tensor | int | None, k: slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of components ``k``: log w_k N(x; a m_k, V_k) [B, K]; U_k^T (x - a m_k); V_k along the axes [B, K] or [B, K, d]."""
        if self._singular and not (s > 0).all():
            raise ValueError("a component has zero variance: at sigma = 0 it has no density. Take a time where sigma > 0.")
        offset = x[:, None] - a[..., None] * self.means[k].to(x)
        if self.basis is not None:
            offset = torch.einsum("bkd,kde->bke", offset, self.basis[k].to(x))
        variances = self.variances[k].to(x)
        if variances.ndim == 1:
            spread = a.square() * variances + s.square()
            deviance = x.shape[1] * (2 * torch.pi * spread).log() + offset.square().sum(-1) / spread
        else:
            spread = a.square()[..., None] * variances + s.square()[..., None]
            deviance = ((2 * torch.pi * spread).log() + offset.square() / spread).sum(-1)
        return self._log_prior(cond)[..., k].to(x) - 0.5 * deviance, offset, spread

    def _posterior(
        self, x: Tensor, a: Tensor, s: Tensor, cond: Tensor | int | None, k: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """log p(x) [B] and E[x0 | x] [B, d] of components ``k``."""
        log_joint, offset, spread = self._joint(x, a, s, cond, k)
        member = log_joint.softmax(1)
        variances = self.variances[k].to(x)
        if variances.ndim == 1:
            pull = ((member * a * variances / spread)[:, None] @ offset)[:, 0]
        else:
            pull = (member * a)[..., None] * variances / spread * offset
            pull = pull.sum(1) if self.basis is None else torch.einsum("bke,kde->bd", pull, self.basis[k].to(x))
        return log_joint.logsumexp(1), member @ self.means[k].to(x) + pull


class PointCloud(GaussianMixture):
    """The empirical law of ``points`` [N, *shape]: the score of a particle cloud. There is no density at sigma = 0.

    Points are taken ``max_elements`` numbers of [B, points, d] at a time, so that without gradients memory does not grow with N.
    """

    def __init__(self, points: Tensor, process: NoiseProcess, *, max_elements: int = 2**22) -> None:
        n = len(points)
        super().__init__(points.flatten(1), torch.zeros(n), torch.ones(n), process, shape=tuple(points.shape[1:]))
        self.max_elements = max_elements

    def _posterior(
        self, x: Tensor, a: Tensor, s: Tensor, cond: Tensor | int | None, k: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        points = range(len(self.means))[k]
        size = max(1, self.max_elements // x.numel())
        log_p, x0 = x.new_full((len(x),), -torch.inf), torch.zeros_like(x)
        for start in range(points.start, points.stop, size):
            log_more, more = super()._posterior(x, a, s, cond, slice(start, min(start + size, points.stop)))
            total = torch.logaddexp(log_p, log_more)
            x0 = (log_p - total).exp()[:, None] * x0 + (log_more - total).exp()[:, None] * more
            log_p = total
        return log_p, x0


def _decompose(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [K, d] and eigenvectors [K, d, d], columns; what is rounding about zero, of either sign, becomes zero."""
    if covariances.ndim != 3 or not torch.allclose(covariances, covariances.mT, rtol=1e-5, atol=1e-8):
        raise ValueError(f"covariances must be symmetric [K, d, d], came {list(covariances.shape)}: one triangle would be ignored.")
    rounding = 10 * covariances.shape[1] * torch.finfo(covariances.dtype).eps
    values, basis = torch.linalg.eigh((covariances + covariances.mT).double() / 2)
    return values.masked_fill(values.abs() <= rounding * values.abs().amax(1, keepdim=True), 0.0), basis
