"""Per-sample numbers against [B, ...]."""

import torch

from fastdiff.losses.shapes import coefficient, from_left, rows


def test_a_number_a_sample_multiplies_its_sample_where_every_axis_has_the_same_size() -> None:
    """[3] against [3, 3, 3] broadcasts from the right without an error, and scales columns."""
    x, w = torch.ones(3, 3, 3), torch.tensor([1.0, 10.0, 100.0])
    for form in (w, w[:, None, None]):
        assert torch.equal((coefficient(form, x) * x)[:, 1, 2], w)
    assert torch.equal(from_left(w, x).squeeze(), w)
    assert torch.equal(coefficient(2.0, x) * x, 2 * x)


def test_times_in_float64_do_not_widen_a_batch() -> None:
    x = torch.ones(2, 5)
    assert (coefficient(torch.tensor([0.1, 0.2], dtype=torch.float64), x) * x).dtype == torch.float32


def test_rows_keep_the_batch_also_without_further_axes() -> None:
    x = torch.arange(12.0)
    assert torch.equal(rows(x.reshape(2, 3, 2)).sum(dim=1), torch.tensor([15.0, 51.0]))
    assert torch.equal(rows(x).mean(dim=1), x)
