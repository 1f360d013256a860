"""Methods whose scores are exact: no gradient at the optimum, the paper's formula away from it."""

import pytest
import torch
from torch import Tensor

from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import DMD2, SwiftBrush
from fastdiff.trainers.method import Batch, Method

OFF = Setting(shift=0.3, spread=1.2)


def posterior_mean(x_t: Tensor, a: Tensor, s: Tensor, means: Tensor, covariance: Tensor, labels: Tensor | None) -> Tensor:
    """E[x0 | x_t] of two Gaussians of one covariance, by linear solves; of the mixture of both without labels."""
    eye = torch.eye(len(covariance), dtype=torch.float64)
    each, fit = [], []
    for mean in means:
        marginal = a[:, None, None] ** 2 * covariance + s[:, None, None] ** 2 * eye
        offset = x_t - a[:, None] * mean
        pull = torch.linalg.solve(marginal, offset)
        each.append(mean + a[:, None] * pull @ covariance)
        fit.append(-0.5 * (offset * pull).sum(1))
    both = torch.stack(each)
    if labels is not None:
        return both[labels, torch.arange(len(labels))]
    share = torch.stack(fit).softmax(0)
    return (share[..., None] * both).sum(0)


def guided(x_t: Tensor, a: Tensor, s: Tensor, means: Tensor, covariance: Tensor, labels: Tensor, scale: float) -> Tensor:
    alone = posterior_mean(x_t, a, s, means, covariance, None)
    return alone + scale * (posterior_mean(x_t, a, s, means, covariance, labels) - alone)


def expected(method: Method, setting: Setting, batch: Batch) -> Tensor:
    """The sheet's G [n, d], divided by the d elements that the loss averages over."""
    real, _, biases, factor = setting.laws()
    covariance = torch.linalg.cholesky(real.moments(0)[1])
    covariance = covariance @ covariance.mT
    draws, y = batch.draws, batch.cond
    t, eps = draws.integers("student_t", 20, 981), draws.normal("student_eps", (setting.d,))
    a, s = real.process.alpha(t), real.process.sigma(t)
    x = biases[y] + draws.normal("z", (setting.d,)) @ factor.mT
    x_t = a[:, None] * x + s[:, None] * eps
    scale = method.guidance_scale  # type: ignore[attr-defined]
    mu_real = guided(x_t, a, s, real.means, covariance, y, scale)
    mu_fake = guided(x_t, a, s, biases, factor @ factor.mT, y, scale if isinstance(method, SwiftBrush) else 1.0)
    if isinstance(method, SwiftBrush):  # s^2 (eps_real - eps_fake), both guided
        return s[:, None] * a[:, None] * (mu_fake - mu_real) / setting.d
    return (mu_fake - mu_real) / (x - mu_real).abs().mean(1, keepdim=True) / setting.d


@pytest.mark.parametrize("method", [SwiftBrush(guidance_scale=1.0), DMD2(guidance_scale=1.0)], ids=lambda m: m.name())
def test_no_gradient_at_the_optimum(method: Method) -> None:
    gradient, *_ = sample_gradients(method, Setting())
    assert gradient.abs().max() < 1e-10
    assert sample_gradients(method, OFF)[0].abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("method", [SwiftBrush, DMD2], ids=lambda m: m.name())
def test_the_gradient_is_the_sheets_formula(method: type[SwiftBrush] | type[DMD2], scale: float) -> None:
    """Guidance of the right networks on the right side, each sample's own normaliser, no detached student."""
    chosen = method(guidance_scale=scale)
    gradient, batch, _ = sample_gradients(chosen, OFF)
    want = expected(chosen, OFF, batch)
    assert want.norm() > 0.1
    assert (gradient - want).norm() < 1e-9 * want.norm()


@pytest.mark.parametrize("method", [SwiftBrush(guidance_scale=1.0), DMD2(guidance_scale=1.0)], ids=lambda m: m.name())
def test_descent_moves_the_samples_towards_the_law(method: Method) -> None:
    """With its mean too high by 0.3 in every direction, the mean gradient is positive in each."""
    gradient, *_ = sample_gradients(method, Setting(shift=0.3, n=2000))
    assert (gradient.mean(0) > 0).all()
