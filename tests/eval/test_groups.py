import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.eval.frechet import covariance_factor, covariance_root, frechet, influences
from fastdiff.eval.groups import frechet_few, group_frechet
from fastdiff.eval.paired import paired_difference
from fastdiff.eval.stats import Stats


def normal(n: int, d: int, seed: int, *, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(x: Tensor) -> Stats:
    return Stats.of(x, extractor="x")


@pytest.mark.parametrize(("n", "m"), [(20, 25), (20, 300), (300, 20), (200, 300)])
def test_nuclear_norm_agrees_with_the_matrix_root(n, m):
    x, y = normal(n, 40, 0, mean=0.2), normal(m, 40, 1, sd=1.5)
    few, whole = frechet_few(x, y), frechet(stats(x), stats(y))
    assert few.value == pytest.approx(whole.value, rel=1e-5)
    assert few.mean_term == pytest.approx(whole.mean_term, rel=1e-12)
    assert few.se == pytest.approx(frechet(stats(x), stats(y), features=x).se, rel=1e-5)


@pytest.mark.parametrize("root", ["none", "symmetric", "cholesky"])
@pytest.mark.parametrize("n", [20, 800])
def test_every_factor_of_the_reference_gives_one_distance_and_one_error(n, root):
    d = 30 if n == 20 else 300  # more than one strip of the product of triangles
    y = normal(1000, d, 1) @ normal(d, d, 2)
    x, reference = normal(n, d, 0, mean=0.3), stats(y)
    factor = {"none": None, "symmetric": covariance_root(reference), "cholesky": covariance_factor(reference)}[root]
    found = frechet(stats(x), reference, features=x, root=factor)
    a, r = stats(x).cov(), covariance_root(reference)
    values = torch.linalg.eigvalsh(r @ a @ r).clamp(min=0)
    oracle = (stats(x).mean - reference.mean).square().sum() + a.trace() + reference.cov().trace() - 2 * values.sqrt().sum()
    assert found.value == pytest.approx(oracle.item(), rel=1e-6)
    assert found.se == pytest.approx(frechet_few(x, y).se, rel=1e-6)
    quick = frechet(stats(x), reference, features=x, root=factor, error=False)
    assert quick.value == pytest.approx(found.value, rel=1e-10)
    assert np.isnan(quick.se)


def test_a_reference_with_a_dead_feature_has_no_cholesky_factor_and_needs_none():
    y = normal(100, 4, 0)
    y[:, 2] = 0.5
    x = normal(80, 4, 1)
    assert frechet(stats(x), stats(y)).value == pytest.approx(frechet_few(x, y).value, rel=1e-9)


def test_influence_is_the_derivative_by_the_weight_of_an_image():
    """Doubling an image m times in a large set moves n FD by m (I(x) - mean I): the definition, by finite differences."""
    x, reference = normal(400, 3, 0, mean=0.5, sd=1.4), stats(normal(300, 3, 1))
    found = influences(x, stats(x), reference)
    weight = 1e-6 * 400

    def weighted(i: int) -> float:
        w = torch.ones(400).double()
        w[i] += weight
        w /= w.sum()
        mean = w @ x
        cov = (x - mean).T @ ((x - mean) * w[:, None])
        return frechet(Stats(2, mean, cov, "x"), reference, error=False).value

    base = weighted(0) - weighted(1)  # differences between images: the constant drops out
    assert base / weight * 400 == pytest.approx((found[0] - found[1]).item(), rel=1e-2)


def test_a_root_of_another_reference_is_refused():
    a, b = stats(normal(50, 4, 0)), stats(normal(50, 4, 1, sd=2))
    with pytest.raises(ValueError, match="no root of this reference"):
        frechet(a, a, root=covariance_root(b))
    with pytest.raises(ValueError, match="no root of this reference"):
        influences(normal(50, 4, 0), a, a, root=torch.eye(3))


def test_each_group_meets_its_own_reference():
    x, y = normal(60, 8, 0), normal(90, 8, 1)
    groups, others = ["cat", "dog", "owl"] * 20, ["owl", "dog", "cat"] * 30
    found = group_frechet(x, groups, y, others)
    assert list(found) == ["cat", "dog", "owl"]
    assert found["cat"] == group_frechet(x[::3], [0] * 20, y[2::3], [0] * 30)[0]
    assert found["cat"].value == pytest.approx(frechet(stats(x[::3]), stats(y[2::3])).value, rel=1e-9)


def test_the_class_that_is_off_stands_out():
    x, y = normal(200, 30, 0), normal(200, 30, 1)
    labels = torch.arange(200) % 10
    x[labels == 7] += 1
    found = group_frechet(x, labels.tolist(), y, labels.tolist())
    assert max(found, key=lambda g: found[g].value) == 7
    assert found[7].mean_term > 3 * found[3].mean_term


def test_groups_without_a_covariance_are_named():
    x = normal(5, 3, 0)
    with pytest.raises(ValueError, match="1 groups such as 'b'"):
        group_frechet(x, ["a", "a", "a", "b", "b"], x, ["a", "a", "a", "a", "b"])
    with pytest.raises(ValueError, match="one group a row"):
        group_frechet(x, ["a"] * 4, x, ["a"] * 5)
    with pytest.raises(ValueError, match="two images or more"):
        frechet_few(x[:1], x)


def test_the_error_of_a_paired_difference_covers_and_is_tighter():
    """Two models that share the noise of a seed: 200 draws against the mean difference of 2000 others."""
    reference = Stats(10**6, torch.zeros(4).double(), torch.eye(4).double() * (10**6 - 1), "x")

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        z, own = normal(150, 4, seed), normal(150, 4, 10**6 + seed)
        return 1.5 * z + 0.3, 1.4 * z + 0.3 + 0.1 * own

    def difference(x: Tensor, y: Tensor) -> float:
        return frechet(stats(x), reference, error=False).value - frechet(stats(y), reference, error=False).value

    target = np.mean([difference(*pair(seed)) for seed in range(1000, 3000)])
    found = [paired_difference(*pair(seed), reference) for seed in range(200)]
    assert found[3].value == pytest.approx(difference(*pair(3)), rel=1e-9)
    assert 0.90 <= np.mean([abs(f.value - target) < 1.96 * f.se for f in found]) <= 0.99
    x, y = pair(0)
    alone = [frechet(stats(f), reference, features=f).se for f in (x, y)]
    assert found[0].se < 0.3 * (alone[0] ** 2 + alone[1] ** 2) ** 0.5


def test_sets_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(normal(5, 2, 0), normal(6, 2, 1), stats(normal(9, 2, 2)))
