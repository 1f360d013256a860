"""Gaussian mixtures: posterior mean and score in closed form."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import GaussianMixture, process_from_scheduler

PROCESS, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
TIMES = torch.tensor([0, 20, 300, 700, 999])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(labels: bool = False) -> GaussianMixture:
    variances = torch.tensor([0.04, 0.3, 1.0, 0.1], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    classes = torch.tensor([0, 1, 0, 1]) if labels else None
    return GaussianMixture(normal(4, 3, seed=1), variances, weights, PROCESS, labels=classes)


@pytest.mark.parametrize("conditional", [False, True])
def test_score_is_the_gradient_of_the_log_density(conditional: bool) -> None:
    law = mixture(labels=conditional)
    cond = torch.tensor([0, 1, 1, 0, 1]) if conditional else None
    x = normal(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_density(x, TIMES, cond).sum(), x)
    score = law(x, TIMES, cond).score.detach()
    assert (score - gradient).norm() < 1e-10 * gradient.norm()


def test_log_density_integrates_to_one() -> None:
    """On a fine grid in one dimension, at every noise level."""
    variances, weights = torch.tensor([0.2, 0.5]).double(), torch.tensor([3.0, 1.0]).double()
    law = GaussianMixture(torch.tensor([[-1.0], [2.0]]).double(), variances, weights, PROCESS)
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64)[:, None]
    for t in TIMES:
        assert law.log_density(grid, t).exp().sum().item() * 0.005 == pytest.approx(1, abs=1e-9)


def test_log_density_is_that_of_torch_distributions() -> None:
    """In three dimensions: the normaliser of each component, (2 pi V)^(d/2), decides which one a point belongs to."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    law, x = mixture(), normal(5, 3)
    for t in TIMES:
        a, s = PROCESS.alpha(t), PROCESS.sigma(t)
        scale = (a.square() * law.variances + s.square()).sqrt()[:, None].expand(4, 3)
        parts = Independent(Normal(a * law.means, scale), 1)
        theirs = MixtureSameFamily(Categorical(logits=law.log_weights), parts)
        torch.testing.assert_close(law.log_density(x, t), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
        member = (law.log_weights + parts.log_prob(x[:, None])).softmax(1)[..., None]
        means = (a * law.variances[:, None] * x[:, None] + s.square() * law.means) / scale.square()
        torch.testing.assert_close(law(x, t).x0, (member * means).sum(1), rtol=1e-10, atol=1e-10)


def test_single_gaussian_posterior_mean() -> None:
    """E[x0 | x_t] = m + a v (x_t - a m) / (a^2 v + s^2)."""
    m, v = normal(1, 3, seed=2), 0.3
    law = GaussianMixture(m, torch.tensor([v], dtype=torch.float64), torch.ones(1).double(), PROCESS)
    x = normal(5, 3)
    a, s = PROCESS.alpha(TIMES)[:, None], PROCESS.sigma(TIMES)[:, None]
    prediction = law(x, TIMES)
    assert (prediction.x0 - (m + a * v * (x - a * m) / (a**2 * v + s**2))).abs().max() < 1e-12
    assert (prediction.score + (x - a * m) / (a**2 * v + s**2)).abs().max() < 1e-9


def test_class_condition_restricts_to_the_components_of_the_class() -> None:
    law, x = mixture(labels=True), normal(5, 3)
    for label in (0, 1):
        keep = law.labels == label
        alone = GaussianMixture(law.means[keep], law.variances[keep], law.log_weights[keep].exp(), PROCESS)
        got = law(x, TIMES, torch.full((5,), label))
        assert (got.x0 - alone(x, TIMES).x0).abs().max() < 1e-12
    both = torch.tensor([0, 1, 0, 1, 1])
    rows = torch.stack([law(x[i : i + 1], TIMES[i : i + 1], both[i : i + 1]).x0[0] for i in range(5)])
    torch.testing.assert_close(law(x, TIMES, both).x0, rows, rtol=1e-12, atol=1e-12)


def test_no_condition_mixes_all_classes() -> None:
    labelled, plain, x = mixture(labels=True), mixture(), normal(5, 3)
    assert torch.equal(labelled(x, TIMES).x0, plain(x, TIMES).x0)


def test_splitting_a_component_changes_nothing() -> None:
    law, x = mixture(), normal(5, 3)
    weights = law.log_weights.exp()
    halves = torch.cat([weights[:1] / 2, weights[:1] / 2, weights[1:]])
    index = torch.tensor([0, 0, 1, 2, 3])
    split = GaussianMixture(law.means[index], law.variances[index], 7 * halves, PROCESS)  # weights need not sum to one
    torch.testing.assert_close(split(x, TIMES).x0, law(x, TIMES).x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.log_density(x, TIMES), law.log_density(x, TIMES), rtol=1e-12, atol=1e-12)


def test_points_of_zero_variance_are_averaged_by_their_posterior() -> None:
    points = normal(6, 3, seed=3)
    cloud = GaussianMixture(points, torch.zeros(6).double(), torch.ones(6).double(), PROCESS)
    x = normal(5, 3)
    a, s = PROCESS.alpha(TIMES)[:, None], PROCESS.sigma(TIMES)[:, None]
    weight = (-(x[:, None] - a[..., None] * points).square().sum(-1) / (2 * s**2)).softmax(1)
    assert (cloud(x, TIMES).x0 - weight @ points).abs().max() < 1e-12
    near = PROCESS.alpha(torch.tensor(0)) * points[2:3]
    assert (cloud(near, torch.tensor([0])).x0 - points[2]).abs().max() < 1e-12


def test_scores_far_from_every_mode_stay_finite() -> None:
    """All component densities underflow there; the softmax must be taken in log space."""
    prediction = GaussianMixture.ring(PROCESS)(torch.full((1, 2), 1e4), torch.tensor([0]))
    assert prediction.x0.isfinite().all()


def test_images_are_flattened_and_given_back_in_their_shape_and_dtype() -> None:
    law = GaussianMixture(normal(4, 12, seed=5), torch.ones(4).double(), torch.ones(4).double(), PROCESS)
    x = normal(5, 3, 2, 2)
    got = law(x, TIMES).x0
    assert torch.equal(got.flatten(1), law(x.flatten(1), TIMES).x0)
    single = law(x.float(), TIMES).x0
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=1e-4, atol=1e-5)


def test_sample_moments() -> None:
    """20,000 samples: five standard errors, a false alarm in 1e6 runs were the seed not fixed."""
    law, n = mixture(), 20_000
    x = law.sample(n, torch.Generator().manual_seed(0))
    w = law.log_weights.exp()[:, None]
    mean = (w * law.means).sum(0)
    variance = (w * (law.variances[:, None] + law.means.square())).sum(0) - mean.square()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    fourth = (x - x.mean(0)).pow(4).mean(0)
    assert ((x.var(0) - variance).abs() < 5 * ((fourth - variance.square()) / n).sqrt()).all()
    assert torch.equal(x, law.sample(n, torch.Generator().manual_seed(0)))


def test_ring_fixture() -> None:
    ring = GaussianMixture.ring(PROCESS)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((8,), 2.0).double(), rtol=1e-12, atol=0)
    gaps = (ring.means[:, None] - ring.means).norm(dim=2).fill_diagonal_(9).amin(1)
    torch.testing.assert_close(gaps, torch.full((8,), 4 * torch.sin(torch.tensor(torch.pi / 8).double())).double())
    std = (ring.means.square().sum(1).mean() / 2 + ring.variances.mean()).sqrt()
    assert std.item() == pytest.approx(1.4222, abs=1e-4)
