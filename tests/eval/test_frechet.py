import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from fastdiff.eval.frechet import covariance_root, frechet
from fastdiff.eval.stats import Stats


def law(mean: Tensor, cov: Tensor, n: int = 1001) -> Stats:
    """Statistics whose covariance is exactly ``cov``."""
    return Stats(n, mean.double(), cov.double() * (n - 1), "x")


def spd(d: int, seed: int) -> Tensor:
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(d, dtype=torch.float64)


def draw(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + noise @ torch.linalg.cholesky(cov).T


def some(d: int, seed: int) -> Stats:
    cov = spd(d, seed)
    return law(draw(1, torch.zeros(d).double(), cov, seed)[0], cov)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_covariances_leave_the_distance_of_the_means():
    cov = spd(4, 0)
    fd = frechet(law(vector(1, 2, 0, 0), cov), law(vector(0, 0, 0, 2), cov))
    assert fd.value == pytest.approx(9, rel=1e-12)
    assert fd.mean_term == pytest.approx(9, rel=1e-12)
    assert fd.cov_term == pytest.approx(0, abs=1e-12)


def test_commuting_covariances():
    a, b = vector(4, 1, 0.25), vector(1, 9, 0.25)
    fd = frechet(law(torch.zeros(3), a.diag()), law(torch.zeros(3), b.diag()))
    assert fd.value == pytest.approx((2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-12)
    assert fd.cov_term == fd.value


def test_scaled_covariance():
    cov = spd(5, 1)
    fd = frechet(law(torch.zeros(5), cov), law(torch.zeros(5), 9 * cov))
    assert fd.value == pytest.approx((1 - 3) ** 2 * cov.trace().item(), rel=1e-10)


def test_one_dimension():
    fd = frechet(law(vector(1.5), vector(4).diag()), law(vector(-0.5), vector(0.25).diag()))
    assert fd.value == pytest.approx(2**2 + (2 - 0.5) ** 2, rel=1e-12)


def test_distance_to_itself_vanishes():
    x = law(torch.ones(6), spd(6, 2))
    assert frechet(x, x).value < 1e-8 * x.cov().trace()


def test_symmetric_and_independent_of_the_frame():
    a, b = some(6, 3), some(6, 4)
    value = frechet(a, b).value
    assert frechet(b, a).value == pytest.approx(value, rel=1e-10)
    turn = torch.linalg.qr(spd(6, 5))[0]

    def moved(s: Stats) -> Stats:
        return law(2 * turn @ s.mean + 7, 4 * turn @ s.cov() @ turn.T)

    assert frechet(moved(a), moved(b)).value == pytest.approx(4 * value, rel=1e-9)
    assert frechet(moved(a), moved(b)).se == pytest.approx(4 * frechet(a, b).se, rel=1e-9)


def test_scipy_matrix_root_agrees():
    a, b = some(8, 6), some(8, 7)
    root = np.trace(sqrtm((a.cov() @ b.cov()).numpy())).real
    oracle = (a.mean - b.mean).square().sum() + a.cov().trace() + b.cov().trace() - 2 * root
    assert frechet(a, b).value == pytest.approx(oracle.item(), rel=1e-6)


def test_a_dead_feature_gives_no_nan():
    a, b = vector(4, 1, 0.5), vector(1, 9, 0)  # the third feature never fires on the reference
    fd = frechet(law(torch.zeros(3), a.diag()), law(torch.zeros(3), b.diag()))
    assert fd.value == pytest.approx(1 + 4 + 0.5, rel=1e-10)
    assert 0 < fd.se < 1


def test_the_root_of_a_singular_covariance_is_real():
    stats = Stats.of(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double(), extractor="x")
    root = covariance_root(stats)
    torch.testing.assert_close(root @ root, stats.cov(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(root) == 5  # round-off is no direction


def test_fewer_images_than_features_stay_real():
    x, y = draw(20, torch.zeros(40), torch.eye(40).double(), 0), draw(25, torch.zeros(40), torch.eye(40).double(), 1)
    a, b = Stats.of(x, extractor="x"), Stats.of(y, extractor="x")
    nuclear = torch.linalg.svdvals((x - a.mean) @ (y - b.mean).T).sum() / (19 * 24) ** 0.5
    oracle = (a.mean - b.mean).square().sum() + a.cov().trace() + b.cov().trace() - 2 * nuclear
    assert frechet(a, b, features=x).value == pytest.approx(oracle.item(), rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_standard_error_is_the_spread_of_repeated_draws(shift):
    """60 draws know their sd to 9 %: the bounds are 3 of these, and miss an error of a factor sqrt(2)."""
    reference = law(torch.zeros(4), torch.eye(4), n=10**6)
    mean, cov = torch.full((4,), shift).double(), vector(2.0, 1.5, 0.5, 0.3).diag()
    values, errors = [], []
    for seed in range(60):
        x = draw(500, mean, cov, seed)
        fd = frechet(Stats.of(x, extractor="x"), reference, features=x)
        values.append(fd.value)
        errors.append(fd.se)
    ratio = np.mean(errors) / np.std(values, ddof=1)
    assert 0.75 < ratio < 1.3


def test_standard_error_in_closed_form():
    """Of so many images that the noise of the map itself is nothing."""
    cov, n = spd(3, 12), 10**11
    shifted = frechet(law(vector(3, 0, 0), cov, n=n), law(torch.zeros(3), cov))
    assert shifted.se == pytest.approx(2 * 3 * (cov[0, 0].item() / n) ** 0.5, rel=1e-9)  # 2 |delta| sd / sqrt(n)
    wider = frechet(law(vector(0), vector(4).diag(), n=n), law(vector(0), vector(1).diag()))
    assert wider.se == pytest.approx((2 * (0.5 * 4) ** 2 / n) ** 0.5, rel=1e-9)  # I - T = 1 - 1/2


def test_standard_error_of_equal_laws_in_closed_form():
    """In one dimension near the reference FD = |dm|^2 + (dS)^2 / (4 S): variances 2 S^2 and 2 (2 S^2)^2 / (16 S^2) over n^2."""
    a = law(vector(0), vector(4).diag(), n=100)
    assert frechet(a, a).se == pytest.approx((2 * 4**2 + 0.5 * 4**2) ** 0.5 / 100, rel=1e-9)


@pytest.mark.parametrize(("shift", "sd"), [(0.0, 1.0), (0.0, 1.3), (0.4, 1.3)], ids=["equal", "wider", "far"])
@pytest.mark.parametrize("given", [True, False], ids=["features", "moments"])
def test_the_error_covers_the_expectation_at_this_n(shift, sd, given):
    """n = 15 d, 200 draws; E FD_n from 2000 others. The population value is another one: FD is biased."""
    d, n, reference = 16, 240, law(torch.zeros(16), torch.eye(16), n=10**6)

    def sample(seed: int) -> Tensor:
        return draw(n, torch.full((d,), shift).double(), sd**2 * torch.eye(d).double(), seed)

    target = np.mean([frechet(Stats.of(sample(s), extractor="x"), reference, error=False).value for s in range(1000, 3000)])
    found = [frechet(Stats.of(x, extractor="x"), reference, features=x if given else None) for x in map(sample, range(200))]
    assert 0.90 <= np.mean([abs(f.value - target) < 1.96 * f.se for f in found]) <= 0.99


def test_standard_error_without_features_is_that_of_a_gaussian():
    cov = spd(4, 10)
    x, reference = draw(40_000, torch.full((4,), 0.3).double(), cov, 3), law(torch.zeros(4), spd(4, 11))
    stats = Stats.of(x, extractor="x")
    assert frechet(stats, reference).se == pytest.approx(frechet(stats, reference, features=x).se, rel=0.03)


def test_heavy_tails_widen_the_error_only_when_the_features_are_given():
    tails = torch.distributions.StudentT(torch.tensor(5.0, dtype=torch.float64))
    torch.manual_seed(0)
    x = tails.sample((4000, 3))
    stats, reference = Stats.of(x, extractor="x"), law(torch.zeros(3), torch.eye(3))
    assert frechet(stats, reference, features=x).se > 1.2 * frechet(stats, reference).se


def test_features_of_other_images_are_refused():
    x = draw(50, torch.zeros(3), torch.eye(3).double(), 0)
    with pytest.raises(ValueError, match="50 x 3"):
        frechet(Stats.of(x, extractor="x"), law(torch.zeros(3), torch.eye(3)), features=x[:40])


def test_statistics_of_other_networks_are_refused():
    a = law(torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="different features"):
        frechet(a, Stats(a.n, a.mean, a.m2, "other"))
