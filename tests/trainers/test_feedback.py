"""Feedback learning in Hyper-SD: which states it looks at, its hinge, its guards, and what it refuses."""

from pathlib import Path

import pytest
import torch
from short_runs import shake, started
from tiny import tiny_teacher
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import HyperSD
from fastdiff.trainers._monitors import warnings_of
from fastdiff.trainers.trajectory import trajectory

TINY = {"pairs": 12, "pair_steps": 2, "rank": 4, "segments": (1,), "stage_steps": 1, "feedback_steps": 2, "gan_weight": 0.0}


class Brightness:
    """The mean of each image."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.seen: list[tuple[Tensor, list[str]]] = []

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        self.seen.append((images, texts))
        return images.mean((1, 2, 3))


def test_the_terms_by_hand(tmp_path: Path) -> None:
    reward, other = Brightness(0.9), Brightness(2.0)
    method = HyperSD(rewards=(reward, other), reward_weight=0.5, drift_weight=3.0, **TINY)
    with started(method, tmp_path, batch_size=8) as run:
        shake(run)
        roles, batch = run._roles, run._micro_batches(1)[0]
        terms = method.loss("feedback", batch, roles)
        assert terms.keys() == {"kept", "reward", "drift"}
        x_i, t = method._late_states(batch, roles)
        assert set(t.tolist()) <= {499, 259}  # of 999, 759, 499, 259 the later half
        after, before = (roles.denoiser(name)(x_i, t, batch.cond).x0 for name in ("student", "previous"))
        images = run.teacher.decode(after)
        bright = images.mean((1, 2, 3))
        want = 0.5 * ((0.9 - bright).clamp(min=0) + (2 - bright).clamp(min=0)).mean()
        assert terms["reward"].item() == pytest.approx(want.item(), rel=1e-5)
        assert terms["drift"].item() == pytest.approx(3 * (after - before).square().mean().item(), rel=1e-4)
        assert (reward.seen[0][0] - images).abs().max() < 1e-5
        assert reward.seen[0][1] == [batch.prompts.prompts[i] for i in batch.prompt_index.tolist()]


def test_states_are_of_the_student_s_own_way_from_the_noise(tmp_path: Path) -> None:
    """The same as in sampling: the last of them leads to the sample."""
    method = HyperSD(**TINY, eta=0.5)
    with started(method, tmp_path, batch_size=8) as run:
        shake(run)
        roles, batch = run._roles, run._micro_batches(1)[0]
        batch.draws.integers = lambda name, low, high, own=batch.draws.integers: own(name, low, high) * 0 + high - 1
        x_i, t = method._late_states(batch, roles)
        assert t.tolist() == [259] * 8
        way = trajectory(
            roles.denoiser("student"),
            batch.noise("z"),
            batch.cond,
            method.levels(),
            "tcd",
            lambda i: batch.noise(f"fresh_{i}"),
            eta=0.5,
        )
        assert torch.equal(way[-1].x_t, x_i)


def test_a_reward_that_is_reached_gives_no_gradient_and_an_unchanged_student_has_no_drift(tmp_path: Path) -> None:
    found = []
    for threshold in (-1.0, 2.0):
        method = HyperSD(rewards=(Brightness(threshold),), **TINY)
        with started(method, tmp_path / str(threshold)) as run:
            run.advance()
            run.method.begin(1, run._roles)
            run._roles.train_only("student")
            terms = method.loss("feedback", run._micro_batches(1)[0], run._roles)
            assert terms["drift"].item() == 0
            gradients = torch.autograd.grad(terms["reward"], run._roles.parameters("student"), allow_unused=True)
            found.append((terms["reward"].item(), sum(g.abs().sum().item() for g in gradients if g is not None)))
    assert found[0] == (0, 0)
    assert found[1][0] > 0
    assert found[1][1] > 0


def test_the_monitor_warns_where_rewards_lead_away_and_not_before() -> None:
    method = HyperSD(drift_weight=2.0)
    assert method.signals({"drift": 0.1, "reward": 0.0}) == {"drift": 0.05}
    assert warnings_of(method.signals({"drift": 0.1})) == {}
    assert "reward_weight" in warnings_of(method.signals({"drift": 0.4}))["drift"]
    assert method.signals({"consistency": 1.0}) == {}


def test_teachers_without_pictures_and_rewards_that_know_other_pictures_are_refused(tmp_path: Path) -> None:
    plain = Teacher.from_module(TimeMLP(3), laws.process(), "epsilon", shape=(3,))
    foreign = tiny_teacher()
    foreign.name = "elsewhere"
    for teacher, word in ((plain, "no RGB picture"), (foreign, "knows the pictures of the bundled")):
        with pytest.raises(UserError, match=word), started(HyperSD(**TINY), tmp_path, teacher):
            pass
    with pytest.raises(UserError, match="rewards is empty"):
        HyperSD(feedback_steps=1, rewards=())
    with pytest.raises(UserError, match="reward_weight"):
        HyperSD(reward_weight=-1.0)
