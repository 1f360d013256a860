import pytest
import torch
from torch import Tensor

from fastdiff.eval.neighbours import nearest, squared_distances
from fastdiff.eval.prdc import prdc


def normal(n: int, d: int, seed: int, *, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def published(x: Tensor, y: Tensor, k: int) -> list[float]:
    """The definition on whole matrices of directly computed distances, as the prdc package has it."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return (a.double()[:, None] - b.double()).norm(dim=2)

    real, fake = (distances(s, s).sort(dim=1).values[:, k] for s in (y, x))  # column 0 is the image itself
    cross = distances(y, x)
    inside = cross < real[:, None]
    return [
        inside.any(dim=0).double().mean().item(),
        (cross < fake).any(dim=1).double().mean().item(),
        inside.double().sum(dim=0).mean().item() / k,
        (cross.min(dim=1).values < real).double().mean().item(),
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block_bytes", [1, 3000, 2**27])
def test_equals_the_published_definition_for_every_block_size(k, block_bytes):
    x, y = normal(70, 5, 0, mean=0.4), normal(90, 5, 1)
    found = prdc(x, y, k=k, block_bytes=block_bytes)
    assert [found.precision, found.recall, found.density, found.coverage] == pytest.approx(published(x, y, k), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_set_against_itself_is_one_in_all_four(offset):
    """Strictly nearer: with <= the k-th neighbour would count, and density be (k + 1) / k."""
    x = normal(200, 8, 0) + offset
    found = prdc(x, x.clone().double(), k=5, block_bytes=9000)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(1, abs=1e-12)


def test_two_far_clusters():
    found = prdc(normal(50, 3, 0, mean=100), normal(50, 3, 1), k=3)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_one_of_two_modes_is_precise_and_covers_half():
    y = torch.cat([normal(300, 4, 0), normal(300, 4, 1, mean=50)])
    found = prdc(normal(600, 4, 2), y)
    assert found.precision > 0.8
    assert found.coverage == pytest.approx(0.5, abs=0.02)
    assert found.recall < 0.55
    assert found.density == pytest.approx(1, abs=0.1)  # each image is in about k balls wherever real ones are


def test_many_equal_images_have_no_ball():
    """k + 1 copies of one real image have radius 0, and nothing is strictly inside, not even the image itself."""
    y = torch.cat([torch.zeros(4, 3), normal(20, 3, 0, mean=30)])
    found = prdc(torch.zeros(5, 3), y, k=3)
    assert (found.precision, found.density, found.coverage) == (0, 0, 0)


@pytest.mark.parametrize("k", [0, 10, 11])
def test_a_missing_kth_neighbour_is_refused(k):
    with pytest.raises(ValueError, match="k < n and k < m"):
        prdc(normal(10, 2, 0), normal(12, 2, 1), k=k)


def test_distances_of_far_and_of_equal_rows():
    y = normal(30, 6, 0) + 1e4
    x = torch.cat([y[3:4], y[5:6] + 1e-2])
    (_, found), *_ = squared_distances(x, y)
    torch.testing.assert_close(found, (x.double()[:, None] - y.double()).square().sum(dim=2), rtol=1e-9, atol=1e-11)
    assert found[0, 3] == 0
    assert found[1, 5] > 0


def test_nearest_are_in_order_and_blocks_do_not_matter():
    x, y = normal(25, 3, 0), normal(40, 3, 1)
    distances, indices = nearest(x, y, 4, block_bytes=700)
    expected = torch.cdist(x.double(), y.double()).sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :4], rtol=1e-10, atol=0)
    assert indices.equal(expected.indices[:, :4])
    with pytest.raises(ValueError, match="41 nearest of 40"):
        nearest(x, y, 41)
