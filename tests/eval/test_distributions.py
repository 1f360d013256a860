"""Distances between samples and a known law: closed forms, floors, and what must show."""

import pytest
import torch

from fastdiff.eval.distributions import covariance_error, gaussian_w2, mode_masses, sliced_w2


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sliced_w2_of_a_shift_is_its_length_over_root_d() -> None:
    """Each direction sees u.c, whose mean square over the sphere is |c|^2 / d."""
    x, c = normal(500, 3), torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert sliced_w2(x, x + c, directions=20_000) == pytest.approx(5 / 3**0.5, rel=0.02)
    assert sliced_w2(x, x[torch.randperm(500, generator=torch.Generator().manual_seed(1))]) < 1e-12


def test_sliced_w2_of_a_scaling_is_exact() -> None:
    """W2 of N(0, I) to its own samples doubled: |u.x| in every direction."""
    x = normal(50_000, 2)
    assert sliced_w2(x, 2 * x) == pytest.approx(1.0, rel=0.02)


def test_sliced_w2_refuses_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="pair up"):
        sliced_w2(normal(4, 2), normal(5, 2))


def test_gaussian_w2_is_the_closed_form_for_commuting_covariances() -> None:
    """|m|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances, of samples whitened to have exactly the first."""
    x = normal(2000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    mean, variances = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([4.0, 0.25, 1.0]).double()
    want = (mean.square().sum() + (1 - variances.sqrt()).square().sum()).sqrt().item()
    assert gaussian_w2(x, mean, variances.diag()) == pytest.approx(want, rel=1e-9)
    assert covariance_error(x, variances.diag()) == pytest.approx(((1 - variances).norm() / variances.norm()).item(), rel=1e-9)


def test_a_lost_mode_and_stray_samples_show_in_the_masses() -> None:
    means, deviations = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), torch.tensor([0.1, 0.1, 1.0])
    samples = torch.tensor([[0.0, 0.3], [0.0, 0.5], [0.2, 0.0], [3.0, 8.5]])
    assert mode_masses(samples, means, deviations).tolist() == [0.5, 0.0, 0.25]
