"""Conditions as tensors and as dicts of tensors."""

import torch

from fastdiff.models.condition import concat, repeat, split_guidance, take, with_guidance


def nested(seed: int, n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(seed)
    inner = {"pooled": torch.randn(n, 2, generator=generator)}
    return {"states": torch.randn(n, 4, 2, generator=generator), "added": inner}


def test_concat_keeps_the_order_of_its_parts_at_every_depth() -> None:
    a, b = nested(0), nested(1, n=2)
    both = concat(a, b)
    assert torch.equal(both["states"], torch.cat([a["states"], b["states"]]))
    assert torch.equal(both["added"]["pooled"], torch.cat([a["added"]["pooled"], b["added"]["pooled"]]))


def test_take_undoes_concat() -> None:
    a, b = nested(0), nested(1, n=2)
    back = take(concat(a, b), torch.tensor([3, 4]))
    assert torch.equal(back["states"], b["states"])
    assert torch.equal(take(concat(a, b), slice(0, 3))["added"]["pooled"], a["added"]["pooled"])


def test_repeat_copies_no_memory() -> None:
    one = nested(0, n=1)
    five = repeat(one, 5)
    assert torch.equal(five["states"], one["states"].expand(5, 4, 2))
    assert five["added"]["pooled"].data_ptr() == one["added"]["pooled"].data_ptr()
    assert torch.equal(repeat(torch.tensor([[1, 2]]), 2), torch.tensor([[1, 2], [1, 2]]))


def test_a_guidance_scale_goes_with_its_rows_and_comes_off_again() -> None:
    cond, scale = nested(0), torch.tensor([1.0, 2.0, 3.0])
    rows = take(concat(with_guidance(cond, scale), with_guidance(cond, 10 * scale)), torch.tensor([4, 0]))
    inner, told = split_guidance(rows)
    assert told.tolist() == [20.0, 1.0]
    assert torch.equal(inner["states"], cond["states"][[1, 0]])
    assert split_guidance(cond) == (cond, None)
    assert split_guidance(scale) == (scale, None)
