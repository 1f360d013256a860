import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.eval.kid import kid


def normal(n: int, d: int, seed: int, *, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def population(d: int, mean: float, variance: float) -> float:
    """KID of N(mean, variance I) to N(0, I) by the moments E (x.y)^p of independent Gaussian vectors."""

    def expected(m1: float, v1: float, m2: float, v2: float) -> float:
        mu, nu = torch.full((d,), m1).double(), torch.full((d,), m2).double()
        eye = torch.eye(d).double()

        def third(m: Tensor, v: float) -> Tensor:
            outer = torch.einsum("i,jk->ijk", m, v * eye)
            return torch.einsum("i,j,k->ijk", m, m, m) + outer + outer.permute(1, 0, 2) + outer.permute(2, 1, 0)

        first = (mu @ nu) / d
        second = ((mu.outer(mu) + v1 * eye) * (nu.outer(nu) + v2 * eye)).sum() / d**2
        return (1 + 3 * first + 3 * second + (third(mu, v1) * third(nu, v2)).sum() / d**3).item()

    same, other = expected(mean, variance, mean, variance), expected(0, 1, 0, 1)
    return same + other - 2 * expected(mean, variance, 0, 1)


def test_brute_force_over_all_pairs():
    x, y = normal(7, 3, 0), normal(7, 3, 1, mean=0.5)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (7 * 6)
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 49
    assert kid(x, y, subset_size=7).value == pytest.approx(expected, rel=1e-12)


def test_subsets_are_seeded_and_their_spread_is_the_population_sd():
    """The draws are numpy's, the generated set before the reference, without replacement inside a subset."""
    x, y = normal(30, 4, 0), normal(50, 4, 1)
    draws, values = np.random.RandomState(7), []
    for _ in range(5):
        a, b = draws.choice(30, 20, replace=False), draws.choice(50, 20, replace=False)
        values.append(kid(x[a], y[b], subset_size=20).value)
    found = kid(x, y, subsets=5, subset_size=20, seed=7)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.sd == pytest.approx(np.std(values), rel=1e-9)
    assert found == kid(x, y, subsets=5, subset_size=20, seed=7)


def test_a_subset_of_everything_is_one_value():
    found = kid(normal(20, 3, 0), normal(20, 3, 1), subset_size=20)
    assert (found.subsets, found.sd) == (1, 0.0)
    assert found.se > 0


def test_equal_laws_are_zero_on_average_and_so_sometimes_negative():
    values = torch.tensor([kid(normal(60, 4, 2 * s), normal(60, 4, 2 * s + 1), subset_size=60).value for s in range(200)])
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert values.min() < 0


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (0.15, 1.0), (0.5, 1.3)], ids=["equal", "near", "far"])
@pytest.mark.parametrize("subset_size", [100, 300])
def test_the_error_covers_the_population_value(mean, sd, subset_size):
    """200 draws; near 95 % between equal laws, where the first-order influence vanishes, and between different ones."""
    d, n = 16, 300
    target, hits = population(d, mean, sd**2), 0
    for s in range(200):
        found = kid(normal(n, d, 2 * s, mean=mean, sd=sd), normal(n, d, 2 * s + 1), subsets=12, subset_size=subset_size)
        hits += abs(found.value - target) < 1.96 * found.se
    assert 0.90 <= hits / 200 <= 0.98


def test_the_error_falls_with_images_where_the_spread_over_subsets_does_not():
    small, large = (kid(normal(n, 8, 0, mean=0.3), normal(n, 8, 1), subsets=400, subset_size=50) for n in (100, 1600))
    assert large.se == pytest.approx(small.se / 4, rel=0.2)
    assert large.sd > small.sd


def test_too_small_sets_are_refused_and_too_small_subsets_have_no_error():
    with pytest.raises(ValueError, match="expected 2 to 9"):
        kid(normal(9, 3, 0), normal(20, 3, 1), subset_size=10)
    with pytest.raises(ValueError, match=r"\(9, 3\) and \(9, 4\)"):
        kid(normal(9, 3, 0), normal(9, 4, 1), subset_size=9)
    assert math.isnan(kid(normal(9, 3, 0), normal(9, 3, 1), subset_size=3).se)
