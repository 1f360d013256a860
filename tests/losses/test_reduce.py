"""The one reducer: masks, weights and denominators."""

import pytest
import torch

from fastdiff.losses import reduce


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_options_it_is_the_mean() -> None:
    x = values(3, 4, 5)
    torch.testing.assert_close(reduce(x), x.mean(), rtol=1e-14, atol=0)


def test_a_mask_equals_the_sub_array() -> None:
    x, mask = values(3, 4, 5), values(3, 4, 5, seed=1) > 0
    torch.testing.assert_close(reduce(x, mask=mask), x[mask].mean(), rtol=1e-13, atol=1e-15)
    rows = torch.tensor([True, False, True])[:, None, None]
    torch.testing.assert_close(reduce(x, mask=rows), x[[0, 2]].mean(), rtol=1e-13, atol=0)


def test_a_weight_belongs_to_the_sample_and_not_to_the_last_axis() -> None:
    """[B] against [B, C, W] with W = B would broadcast from the right and weigh columns."""
    x, w = values(3, 2, 3), torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    want = sum(w[i] * x[i].sum() for i in range(3)) / x.numel()
    torch.testing.assert_close(reduce(x, weight=w), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(reduce(x, weight=w[:, None, None]), want, rtol=1e-13, atol=0)


def test_a_mask_of_samples_masks_samples_whatever_the_other_sizes() -> None:
    """Broadcast from the right, [B] on [B, n, B] would mask columns, without an error."""
    x, mask = values(3, 2, 3), torch.tensor([True, False, True])
    torch.testing.assert_close(reduce(x, mask=mask), x[[0, 2]].mean(), rtol=1e-13, atol=0)


def test_weight_and_mask_together_divide_by_the_count_and_not_by_the_weight() -> None:
    x, w, mask = values(3, 4), torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64), values(3, 4, seed=1) > 0
    want = (w[:, None] * x)[mask].sum() / mask.sum()
    torch.testing.assert_close(reduce(x, weight=w, mask=mask), want, rtol=1e-13, atol=0)


def test_denominator_is_what_is_divided_by() -> None:
    x, mask = values(3, 4), values(3, 4, seed=1) > 0
    torch.testing.assert_close(reduce(x, denominator=7.0), x.sum() / 7, rtol=1e-13, atol=0)
    torch.testing.assert_close(reduce(x, mask=mask, denominator=12.0), x[mask].sum() / 12, rtol=1e-13, atol=0)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert reduce(x, mask=nothing, denominator=12.0) == 0


def test_parts_with_a_shared_denominator_add_up_to_the_whole() -> None:
    """Accumulation over unequal micro-batches: means of parts would not."""
    x = values(5, 4)
    parts = sum(reduce(part, denominator=x.numel()) for part in (x[:1], x[1:]))
    torch.testing.assert_close(parts, reduce(x), rtol=1e-13, atol=0)


def test_an_empty_mask_is_refused_and_not_zero_over_zero() -> None:
    with pytest.raises(ValueError, match="mask"):
        reduce(values(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask"):
        reduce(values(0, 3))


def test_masked_entries_give_no_gradient_even_when_not_finite() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), 3.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, False, True])
    loss = reduce(x, mask=mask, weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    loss.backward()
    assert loss == 6.5
    assert torch.equal(x.grad, torch.tensor([0.5, 0.0, 0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """1 + 4,096 times 2^-9 is 9; in bfloat16 the small terms would be lost, or the sum rounded."""
    x = torch.cat([torch.ones(1), torch.full((4096,), 2.0**-9)]).to(dtype)
    total = reduce(x, denominator=1.0)
    assert total.dtype == torch.float32
    assert total == 9
    weighted = reduce(torch.full((1,), 1.0, dtype=dtype), weight=torch.tensor([1 + 2.0**-12]))
    assert weighted == 1 + 2.0**-12


def test_float64_stays_and_the_gradient_is_numerical() -> None:
    x, w, mask = values(3, 2).requires_grad_(), values(3, seed=1), values(3, 2, seed=2) > -1
    assert reduce(x).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda y: reduce(y, weight=w, mask=mask), (x,))
