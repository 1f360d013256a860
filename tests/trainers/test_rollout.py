"""The rollout pool: what is in it, that nothing is used twice, and what a cycle costs."""

from pathlib import Path

import pytest
import torch
from short_runs import program, shake, started

from fastdiff import Trainer
from fastdiff.trainers import DMD2, TDM
from fastdiff.trainers.method import Method
from fastdiff.trainers.rollout import Moments, pooled_updates
from fastdiff.trainers.trajectory import trajectory


def moments_of(run: Trainer, pool: object, uses: int) -> list[Moments]:
    batch = run._micro_batches(0)[0]
    return [pool.fake_score_samples(batch, run._roles, 0, use) for use in range(uses)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("guidance_scale", "forwards"), [(3.0, 26), (1.0, 25)])
def test_a_cycle_of_five_fake_score_updates_and_one_of_the_student_costs_26_forwards(
    guidance_scale: float, forwards: int, tmp_path: Path
) -> None:
    """A backward through the weights counts two. DMD2's own code needs 32.5, with a rollout for each loss 35."""
    with started(DMD2(steps=4, ratio=(1, 5), guidance_scale=guidance_scale), tmp_path) as run:
        for step in range(10):
            run._iteration(step)
        roles = run._roles
        counted = sum(roles.ledger.values()) + 2 * sum(roles.backwards.values())
        assert counted == 2 * forwards * run.config.batch_size
        assert roles.backwards == {"student": 2 * 4, "fake_score": 10 * 4}


def test_two_cycles_with_a_rollout_for_each_loss_cost_70_forwards(tmp_path: Path) -> None:
    """What ``eval/bench_cycle.py`` times the pool against: every rung equally often."""
    method = program("bench_cycle").Separate(steps=4, ratio=(1, 5))
    rungs = [method.rung(step, loss) for step in range(10) for loss in method.updates(step)]
    assert sorted(rungs) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    with started(method, tmp_path) as run:
        for step in range(10):
            run._iteration(step)
        roles = run._roles
        assert sum(roles.ledger.values()) + 2 * sum(roles.backwards.values()) == 70 * run.config.batch_size
        assert roles.backwards == {"student": 2 * 4, "fake_score": 10 * 4}


@pytest.mark.parametrize("method", [DMD2(steps=4, ratio=(1, 5)), TDM(step_counts=(4,), start=1000, fake_updates=5)])
def test_states_are_those_of_the_deployed_sampler_on_the_same_noise(method: Method, tmp_path: Path) -> None:
    with started(method, tmp_path) as run:
        shake(run)
        pool = method._pool if isinstance(method, DMD2) else method._pools[4]  # type: ignore[attr-defined]
        found = Moments.concat(moments_of(run, pool, 5))
        draws = run._micro_batches(0)[0].draws.at(0, 5)
        noise = [draws.normal(f"pool_noise_{i}", run.teacher.latent_shape) for i in range(4)]
        prompt = draws.integers("pool_prompts", 0, len(run.prompts))
        with torch.no_grad():
            made = trajectory(
                run._roles.denoiser("student"),
                noise[0],
                run.prompts.conditions(prompt),
                pool.levels,
                method.sampler,
                noise.__getitem__,
            )
        states = [prediction.x_t for prediction in made] + [made[-1].x0]
        for rung, prediction in enumerate(made):
            own = found.rung == rung
            assert own.sum() == 5
            for row in own.nonzero().flatten().tolist():
                distance = (found.x_t[row] - states[rung]).flatten(1).norm(dim=1)
                index = int(distance.argmin())
                assert distance[index] < 1e-4
                assert torch.allclose(found.x0[row], prediction.x0[index], atol=1e-4)
                assert torch.allclose(found.after[row], states[rung + 1][index], atol=1e-4)
                assert found.prompt[row] == prompt[index]


def test_no_moment_is_used_twice_and_a_new_cycle_makes_new_ones(tmp_path: Path) -> None:
    method = DMD2(steps=4, ratio=(1, 5))
    with started(method, tmp_path) as run:
        first = Moments.concat(moments_of(run, method._pool, 5))
        rows = first.x_t.flatten(1)
        assert len(torch.unique(rows, dim=0)) == 20
        batch = run._micro_batches(5)[0]
        later = method._pool.fake_score_samples(batch, run._roles, 5, 0)
        assert not (rows[:, None] == later.x_t.flatten(1)[None]).all(2).any()
        own = method._pool.student_inputs(batch, run._roles, 5)
        assert len(torch.unique(own.x_t.flatten(1), dim=0)) == 4


def test_a_pool_made_again_within_a_cycle_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """What a resumed run does."""
    found = []
    for folder in ("a", "b"):
        method = DMD2(steps=2, ratio=(1, 3))
        with started(method, tmp_path / folder) as run:
            shake(run)
            found.append(method._pool.fake_score_samples(run._micro_batches(2)[0], run._roles, 0, 2))
    for name, value in vars(found[0]).items():
        assert torch.equal(value, getattr(found[1], name)), name


def test_the_rollout_comes_first_and_the_student_last() -> None:
    assert pooled_updates(0, 1) == ("rollout", "fake_score", "student")
    assert [pooled_updates(step, 2) for step in range(2)] == [("rollout", "fake_score"), ("fake_score", "student")]


@pytest.mark.parametrize("method", [DMD2(steps=2, ratio=(1, 2)), TDM(step_counts=(2,), start=1000, fake_updates=2)])
def test_a_pool_is_of_one_run_and_not_of_the_next_with_the_same_method(method: Method, tmp_path: Path) -> None:
    """The second run would train on the first one's samples, or on a plan's tensors without values."""
    ledgers = []
    for name in ("first", "second"):
        with started(method, tmp_path / name) as run:
            run._iteration(0)
            ledgers.append(run._roles.ledger["student"])
    assert ledgers[0] == ledgers[1] > 0
