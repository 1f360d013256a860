import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as Oracle

from fastdiff.eval.inception_score import inception_score


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def logits(n: int, c: int, seed: int, *, sharpness: float = 2.0) -> Tensor:
    return sharpness * torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def test_certain_and_even_classes_score_their_number_and_equal_images_one():
    even = 1e4 * torch.eye(5).repeat(4, 1)
    assert inception_score(even, splits=1).value == pytest.approx(5, rel=1e-9)
    assert inception_score(logits(1, 5, 0).expand(20, 5), splits=2).value == pytest.approx(1, rel=1e-9)


def test_one_split_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    m = [0.55, 0.45]
    kl = [sum(row[c] * math.log(row[c] / m[c]) for c in range(2)) for row in p.tolist()]
    assert inception_score(p.log(), splits=1).value == pytest.approx(math.exp(sum(kl) / 2), rel=1e-12)


def test_torchmetrics_agrees_on_the_same_logits():
    x = logits(60, 7, 1)
    oracle = Oracle(feature=Identity(), splits=1)
    oracle.update(x)
    assert inception_score(x, splits=1).value == pytest.approx(oracle.compute()[0].item(), rel=1e-5)


def test_splits_are_the_published_ones():
    """torch-fidelity: shuffled, cut at i n / splits, population sd. guided-diffusion: in order, by size."""
    x = logits(23, 4, 2)
    order = np.random.RandomState(5).permutation(23)
    one = [inception_score(x[order[i * 23 // 4 : (i + 1) * 23 // 4]], splits=1, seed=None).value for i in range(4)]
    found = inception_score(x, splits=4, seed=5)
    assert (found.value, found.sd) == (pytest.approx(np.mean(one)), pytest.approx(np.std(one)))
    by_size = [inception_score(part, splits=1, seed=None).value for part in (x[:10], x[10:20], x[20:])]
    found = inception_score(x, split_size=10, seed=None)
    assert (found.value, found.splits) == (pytest.approx(np.mean(by_size)), 3)


def test_a_class_of_no_probability_gives_no_nan():
    x = torch.tensor([[0.0, -1e5, 0.0], [3.0, -1e5, 0.0]])
    assert 1 < inception_score(x, splits=1).value < 2


def test_empty_splits_are_refused():
    with pytest.raises(ValueError, match="an image or more a split"):
        inception_score(logits(5, 3, 0), splits=6)
