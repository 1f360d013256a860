import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.eval.fd_infinity import fd_infinity, line, published_sizes
from fastdiff.eval.frechet import covariance_root, frechet
from fastdiff.eval.stats import Stats


def normal(n: int, d: int, seed: int, *, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard(d: int) -> Stats:
    """N(0, I) as given, without sampling error."""
    return Stats(10**6, torch.zeros(d).double(), torch.eye(d).double() * (10**6 - 1), "x")


def test_line_is_least_squares():
    u, v = torch.tensor([0.1, 0.2, 0.4, 0.9]).double(), torch.tensor([1.0, 1.4, 1.5, 3.0]).double()
    slope, intercept = np.polyfit(u.numpy(), v.numpy(), 1)
    cov = np.polyfit(u.numpy(), v.numpy(), 1, cov=True)[1]
    found = line(u, v)
    assert found[:2] == (pytest.approx(intercept), pytest.approx(slope))
    assert found[2] == pytest.approx((((v.numpy() - intercept - slope * u.numpy()) ** 2).sum() / 2) ** 0.5)
    assert found[3] == pytest.approx(cov[1, 1] ** 0.5)
    assert line(u, 2 + 3 * u) == (pytest.approx(2), pytest.approx(3), pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_sizes_are_those_of_dgm_eval():
    expected = np.linspace(min(5000, max(50_000 // 10, 2)), 50_000, 15).astype("int32")
    assert published_sizes(50_000) == tuple(expected.tolist())
    assert published_sizes(1234) == tuple(np.linspace(123, 1234, 15).astype("int32").tolist())


def test_equal_laws_extrapolate_to_zero_along_a_rising_line():
    found = fd_infinity(normal(3000, 12, 0), standard(12), sizes=(200, 300, 500, 750, 1000, 1500, 3000))
    assert found.slope > 0
    assert abs(found.value) < 3 * max(found.se, found.residual)
    assert found.value < 0.2 * found.values[-1]
    assert all(a > b for a, b in zip(found.values, found.values[1:], strict=False))


def test_a_point_is_the_mean_over_disjoint_blocks_or_one_subset():
    x, reference = normal(100, 5, 0), standard(5)
    sizes = (30, 50, 100)
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(100, generator=generator) for _ in sizes]

    def fd(rows: Tensor) -> float:
        return frechet(Stats.of(x[rows], extractor="x"), reference).value

    found = fd_infinity(x, reference, sizes=sizes, seed=4)
    blocks = [[o[i : i + s] for i in range(0, 100 - s + 1, s)] for o, s in zip(orders, sizes, strict=True)]
    assert [len(b) for b in blocks] == [3, 2, 1]
    assert found.values == pytest.approx([np.mean([fd(rows) for rows in b]) for b in blocks], rel=1e-9)
    one = fd_infinity(x, reference, sizes=sizes, seed=4, blocks="one", root=covariance_root(reference))
    assert one.values == pytest.approx([fd(o[:s]) for o, s in zip(orders, sizes, strict=True)], rel=1e-9)


def test_the_error_covers_the_population_value_where_plain_fd_does_not():
    """200 draws of N(m, 1.3^2 I) against N(0, I), whose distance is known."""
    d, n, target = 4, 400, 4 * (0.3**2 + 0.3**2)
    covered = plain = 0
    for seed in range(200):
        x = normal(n, d, seed, mean=0.3, sd=1.3)
        found = fd_infinity(x, standard(d), sizes=(50, 100, 200, 400))
        covered += abs(found.value - target) < 1.96 * found.se
        fd = frechet(Stats.of(x[:50], extractor="x"), standard(d), features=x[:50])
        plain += abs(fd.value - target) < 1.96 * fd.se
    assert 0.90 <= covered / 200 <= 0.99
    assert plain < covered


def test_a_line_needs_three_sizes_within_the_set():
    for sizes in ((10, 20), (10, 20, 31), (1, 10, 20), (10, 10, 10)):
        with pytest.raises(ValueError, match="three sizes or more from 2 to n"):
            fd_infinity(normal(30, 2, 0), standard(2), sizes=sizes)
