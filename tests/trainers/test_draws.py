"""Random numbers by name, step and rank."""

import pytest
import torch

from fastdiff.trainers.draws import Draws, generator_for


def draws(step: int = 5, *, seed: int = 0, rank: int = 0, size: int = 8, part: slice = slice(None)) -> Draws:
    return Draws(seed, rank, step, size=size, part=part)


def everything(d: Draws) -> list[torch.Tensor]:
    return [d.normal("z", (2, 3)), d.uniform("u"), d.integers("t", 20, 981)]


def test_four_micro_batches_see_what_one_batch_sees() -> None:
    whole = everything(draws())
    parts = [everything(draws(part=slice(2 * i, 2 * i + 2))) for i in range(4)]
    for full, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), full)
    assert [len(draws(part=slice(2 * i, 2 * i + 2))) for i in range(4)] == [2] * 4
    assert len(draws()) == 8


def test_a_second_call_repeats_the_first() -> None:
    """An update that asks again for the noise of an earlier one gets that noise, and a resumed run the old numbers."""
    d = draws()
    for first, again, resumed in zip(everything(d), everything(d), everything(draws()), strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first, resumed)


@pytest.mark.parametrize("change", [{"step": 6}, {"seed": 1}, {"rank": 1}])
def test_another_step_seed_or_rank_draws_other_numbers(change: dict) -> None:
    for a, b in zip(everything(draws(size=64)), everything(draws(size=64, **change)), strict=True):
        assert (a == b).float().mean() < 0.1


def test_another_name_draws_other_numbers() -> None:
    d = draws(size=64)
    assert not torch.equal(d.normal("z", (2,)), d.normal("eps", (2,)))
    assert not torch.equal(d.integers("student_t", 20, 981), d.integers("fake_t", 20, 981))
    assert d.choice("null") != d.choice("other")


def test_keys_do_not_run_into_each_other() -> None:
    """Seed 1, step 23 and seed 12, step 3 must not be one generator."""
    keys = [(1, 23, "z"), (12, 3, "z"), (1, 2, "3z"), (0, 1, 23, "z"), (1, 23), ("1", "23", "z2")]
    firsts = {torch.rand((), generator=generator_for(*key), dtype=torch.float64).item() for key in keys}
    assert len(firsts) == len(keys)


def test_a_choice_is_equal_on_all_ranks_and_in_all_micro_batches() -> None:
    """Ranks that disagree on which update to make wait for each other's all-reduce for ever."""
    choices = {draws(rank=r, part=slice(2 * i, 2 * i + 2)).choice("null") for r in range(4) for i in range(4)}
    assert len(choices) == 1
    assert draws(step=6).choice("null") not in choices
    assert draws(seed=1).choice("null") not in choices


def test_laws() -> None:
    """20,000 draws: five standard errors of mean and variance, every integer hit, both ends included."""
    n = 20_000
    d = draws(size=n)
    z, u, t = d.normal("z", (2,)).double(), d.uniform("u"), d.integers("t", 3, 9)
    assert z.mean(0).abs().max() < 5 / n**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / n) ** 0.5
    assert torch.corrcoef(z.T)[0, 1].abs() < 5 / n**0.5
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / (12 * n) ** 0.5
    counts = torch.bincount(t, minlength=10)
    assert counts[:3].sum() == counts[9:].sum() == 0
    assert (counts[3:9] - n / 6).abs().max() < 5 * (n * 5 / 36) ** 0.5
    choices = torch.tensor([draws(step=s).choice("null") for s in range(2000)])
    assert (choices.min() >= 0) & (choices.max() < 1)
    assert abs(choices.mean() - 0.5) < 5 / (12 * 2000) ** 0.5


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    everything(draws())
    draws().choice("null")
    assert torch.equal(torch.get_rng_state(), state)
