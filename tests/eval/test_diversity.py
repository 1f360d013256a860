import pytest
import torch
from torch import Tensor

from fastdiff.eval.diversity import prompt_diversity
from fastdiff.eval.memorisation import lone_ratio, memorisation


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_mean_pairwise_distance_by_hand_with_its_error_over_prompts():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0], [10, 0], [10, 2]])
    score = prompt_diversity(x, ["a", "a", "b", "a", "b"])
    a = (5 + 10 + (49 + 16) ** 0.5) / 3
    b = (100 + 4) ** 0.5
    assert score.value == pytest.approx((a + b) / 2)
    assert score.se == pytest.approx(abs(a - b) / 2)  # sd of two values over sqrt 2


def test_prompts_that_differ_are_no_diversity():
    """A collapsed generator: one image a prompt, whatever the noise."""
    x = normal(5, 3, 0).repeat_interleave(4, dim=0)
    prompts = [i for i in range(5) for _ in range(4)]
    assert prompt_diversity(x, prompts).value == 0
    assert prompt_diversity(x + normal(20, 3, 1), prompts).value > 1


def test_cosine_distance_ignores_lengths():
    x = torch.tensor([[2.0, 0], [0, 5], [1, 1], [-3, -3]])
    assert prompt_diversity(x, [0, 0, 1, 1], distance="cosine").value == pytest.approx((1 + 2) / 2)


def test_lone_images_and_unknown_distances_are_refused():
    with pytest.raises(ValueError, match="1 prompts such as 'b' have one image"):
        prompt_diversity(normal(3, 2, 0), ["a", "b", "a"])
    with pytest.raises(ValueError, match="'euclidean' or 'cosine'"):
        prompt_diversity(normal(2, 2, 0), ["a", "a"], distance="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one prompt a row"):
        prompt_diversity(normal(2, 2, 0), ["a"])


def test_copies_are_found_and_new_images_are_not():
    training = normal(500, 10, 0)
    x = torch.cat([normal(40, 10, 1), training[:7] + 0.01 * normal(7, 10, 2), training[20:23]])
    found = memorisation(x, training, block_bytes=20_000)
    assert found.copied.value == pytest.approx(10 / 50)
    assert found.copies == 3
    assert found.indices[40:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 20, 21, 22]
    assert found.nearest_pairs(3) == [(47, 20), (48, 21), (49, 22)]
    exact = torch.cdist(x.double(), training.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.sort(dim=1).values[:, :5]
    torch.testing.assert_close(found.distances, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.ratio[:47], (expected[:, 0] / expected[:, 1])[:47], rtol=1e-8, atol=0)


def test_a_training_image_that_occurs_twice_does_not_hide_its_copy():
    training = torch.cat([normal(100, 6, 0), normal(100, 6, 0)[:10]])
    found = memorisation(training[:10] + 0.01, training)
    assert found.copied.value == 1


def test_ratio_of_equal_distances():
    rows = [[0.0, 0, 2], [0, 0, 0], [1, 1, 4], [1, 1 + 1e-9, 4], [1, 2, 2], [3, 3, 3]]
    assert lone_ratio(torch.tensor(rows, dtype=torch.float64)).tolist() == [0, 0, 0.25, 0.25, 0.5, 1]


def test_one_training_image_has_no_second_neighbour():
    with pytest.raises(ValueError, match="two or more"):
        memorisation(normal(3, 2, 0), normal(1, 2, 1))
