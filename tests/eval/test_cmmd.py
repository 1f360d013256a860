import math

import pytest
import torch
from torch.nn.functional import normalize

from fastdiff.eval.cmmd import cmmd


def normal(n: int, d: int, seed: int, *, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_two_points_at_a_right_angle():
    """|x - y| = sqrt 2: 2000 (1 - e^-0.01), and lengths do not matter since embeddings are of unit length."""
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)
    assert cmmd(x, y) == pytest.approx(19.9003, abs=1e-4)


def test_equal_sets_are_at_zero_and_small_distances_keep_their_digits():
    x = normal(50, 16, 0)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-12)
    near = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 1e-5]], dtype=torch.float64)
    assert cmmd(*near) == pytest.approx(2000 * 1e-10 / 200, rel=1e-4)


@pytest.mark.parametrize("block_bytes", [1, 5000, 2**27])
def test_equals_the_published_form_for_every_block_size(block_bytes):
    """As google-research has it: means of whole kernel matrices, diagonals included."""
    x, y = normal(40, 8, 0, mean=0.3), normal(60, 8, 1)
    a, b = normalize(x.double(), dim=1), normalize(y.double(), dim=1)

    def mean(u: torch.Tensor, v: torch.Tensor) -> float:
        return (-torch.cdist(u, v).square() / 200).exp().mean().item()

    assert cmmd(x, y, block_bytes=block_bytes) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-8)


def test_the_bias_of_equal_laws_is_the_stated_one():
    values = torch.tensor([cmmd(normal(50, 8, 2 * s), normal(100, 8, 2 * s + 1)) for s in range(60)])
    spread = 1 - math.exp(-2 / 200)  # E |x - y|^2 = 2 on the sphere, nearly linear in the kernel
    assert values.mean().item() == pytest.approx(1000 * (1 / 50 + 1 / 100) * spread, rel=0.05)
