import pytest
import torch

from fastdiff.eval.distributions import sliced_w2
from fastdiff.eval.mind import mind
from fastdiff.eval.spatial import spatial_features


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_of_a_shift_is_three_times_its_squared_length():
    """Each direction sees (u.c)^2, whose mean over the sphere is |c|^2 / d; then times 3 d."""
    x, c = normal(300, 4, 0), torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert mind(x, x + c, directions=30_000) == pytest.approx(3 * 25, rel=0.02)
    assert mind(x, x[torch.randperm(300, generator=torch.Generator().manual_seed(1))]) < 1e-10


def test_agrees_with_the_plain_sliced_distance():
    x, y = normal(200, 5, 0), 2 * normal(200, 5, 1)
    assert mind(x, y, directions=4000) == pytest.approx(15 * sliced_w2(x, y, directions=4000) ** 2, rel=0.05)


def test_draws_are_those_of_the_published_code():
    """First the subset of the larger set, then all directions in float32, from one seeded generator."""
    x, y = normal(40, 3, 0), normal(70, 3, 1)
    generator = torch.Generator().manual_seed(9)
    chosen = y[torch.randperm(70, generator=generator)[:40]]
    units = torch.randn(200, 3, generator=generator)
    units = units / units.norm(dim=1, keepdim=True)
    pairs = [(p @ units.T).sort(dim=0).values for p in (x, chosen)]
    expected = 9 * (pairs[0] - pairs[1]).square().mean().item()
    assert mind(x, y, directions=200, seed=9) == pytest.approx(expected, rel=1e-5)


def test_spatial_features_are_in_the_order_of_tensorflow():
    """ADM's mu_s runs over height, width and seven channels; of the first of more channels."""
    maps = torch.arange(2 * 9 * 3 * 3.0).view(2, 9, 3, 3)
    rows = spatial_features(maps)
    assert rows.shape == (2, 63)
    assert rows[1, (2 * 3 + 1) * 7 + 5] == maps[1, 5, 2, 1]
    assert spatial_features(torch.zeros(1, 192, 17, 17)).shape == (1, 2023)
    with pytest.raises(ValueError, match="C >= 7"):
        spatial_features(torch.zeros(2, 3, 5, 5))
