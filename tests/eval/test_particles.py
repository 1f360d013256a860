"""Measures of particles against numbers worked out by hand."""

import math

import pytest
import torch

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.eval.particles import chroma, log_likelihood, out_of_range, pair_distance
from fastdiff.proof import laws


def test_distances_are_over_pairs_and_a_root_mean_square() -> None:
    views = torch.zeros(3, 2, 3, 4, 4)
    views[1], views[2] = 1.0, 3.0
    assert pair_distance(views) == pytest.approx((1 + 3 + 2) / 3)
    assert pair_distance(views[:1].expand(2, -1, -1, -1, -1)) == 0
    with pytest.raises(ValueError, match="at least two"):
        pair_distance(views[:1])


def test_grey_has_no_chroma_and_pure_red_two() -> None:
    grey, red = torch.full((1, 1, 3, 2, 2), 0.4), torch.full((1, 1, 3, 2, 2), -1.0)
    red[:, :, 0] = 1.0
    assert chroma(grey) == 0
    assert chroma(torch.cat([grey, red])) == pytest.approx(1.0)


def test_values_beyond_the_screen_are_counted_on_both_sides() -> None:
    assert out_of_range(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.01])) == pytest.approx(0.4)


def test_the_likelihood_is_that_of_each_view_under_its_own_class() -> None:
    law = GaussianMixture(
        torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.full((2,), 0.25), torch.ones(2), laws.process(), labels=torch.tensor([0, 1])
    )
    first = torch.tensor(0)
    a, s = law.process.alpha(first).item(), law.process.sigma(first).item()
    views = torch.stack([torch.tensor([[0.0, 0.0], [3.0, 3.0]])] * 2)
    variance = 0.25 * a**2 + s**2
    away = (3 - a * 3) ** 2
    want = -0.5 * math.log(2 * math.pi * variance) - 0.5 * 0.5 * away / variance
    assert log_likelihood(law, views) == pytest.approx(want, rel=1e-6)
    assert log_likelihood(law, views.flip(1)) < want - 5
