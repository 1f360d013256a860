"""DMD: matching and regression in one update, and what it has in common with DMD2."""

from pathlib import Path

import pytest
import torch
from short_runs import gradients, shake, started
from tiny import tiny_teacher

from fastdiff.data.pairs import Pairs
from fastdiff.losses import pseudo_huber
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import DMD, DMD2
from fastdiff.trainers.method import Method, one_step

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "pairs": DMD(**PAIRS),
    "warm": DMD(warm_start_steps=2, fake_score_warmup=1, **PAIRS),
}
OFF = Setting(shift=0.3, spread=1.2)


def test_without_regression_it_is_dmd2_at_one_to_one(tmp_path: Path) -> None:
    found = []
    for method in (DMD(regression_weight=0.0), DMD2(guidance_scale=3.0, ratio=(1, 1))):
        with started(method, tmp_path / method.name()) as run:
            shake(run)
            found.append(gradients(run))
            assert not list(run.folder.glob("pairs*"))
    first, second = found
    assert first.keys() == second.keys() == {"0 student student", "0 fake_score fake_score"}
    for key, gradient in first.items():
        assert torch.equal(gradient.nan_to_num(), second[key].nan_to_num())


def test_the_optimum_is_at_rest_without_regression_and_descent_moves_towards_the_law() -> None:
    method = DMD(regression_weight=0.0, guidance_scale=1.0)
    assert sample_gradients(method, Setting())[0].abs().max() < 1e-10
    assert sample_gradients(method, OFF)[0].abs().max() > 1e-2
    assert (sample_gradients(method, Setting(shift=0.3, n=2000))[0].mean(0) > 0).all()


def test_both_terms_are_of_one_update_and_the_regression_is_a_quarter_of_the_distance(tmp_path: Path) -> None:
    with started(DMD(**PAIRS), tmp_path) as run:
        shake(run)
        batch, roles = run._micro_batches(0)[0], run._roles
        terms = run.method.loss("student", batch, roles)
        index = batch.draws.integers("pairs", 0, 12)
        stored = run.method._pairs
        sample = one_step(roles.denoiser("student"), stored.noise[index], run.prompts.conditions(stored.prompt[index]))
        want = 0.25 * pseudo_huber(sample, stored.x0[index], c=0.1).mean()
    assert set(terms) == {"dmd", "regression"}
    assert want > 0
    assert terms["regression"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_gradient_is_the_sum_of_dmd2s_and_the_regressions(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 0.25, 0.75):
        with started(DMD(regression_weight=weight, **PAIRS), tmp_path / str(weight)) as run:
            shake(run)
            found[weight] = gradients(run)["0 student student"].nan_to_num()
    regression = (found[0.75] - found[0.25]) / 0.5
    assert regression.norm() > 0
    assert (found[0.25] - found[0.0] - 0.25 * regression).norm() < 1e-3 * (0.25 * regression).norm()


def test_every_iteration_updates_both_once_and_after_a_warm_start_too() -> None:
    cold, warm = DMD(), DMD(warm_start_steps=2)
    assert {cold.updates(step) for step in range(20)} == {("student", "fake_score")}
    assert [warm.updates(step) for step in (1, 2)] == [("regression",), ("student", "fake_score")]
    assert warm.lr_of("student", 1) == warm.regression_lr != warm.lr == warm.lr_of("student", 2)


def test_the_pairs_of_one_teacher_are_not_another_students(tmp_path: Path) -> None:
    """Left over from another teacher in the same folder, they would pull the student to its results."""
    with started(DMD(**PAIRS), tmp_path) as run:
        own = run.method._pairs.x0
    settings = {"teacher": tiny_teacher(seed=1).identity()}
    assert Pairs.load(tmp_path / "pairs-0.safetensors", settings) is None
    with started(DMD(**PAIRS), tmp_path, tiny_teacher(seed=1)) as run:
        assert not torch.equal(run.method._pairs.x0, own)
    with started(DMD(**PAIRS), tmp_path, tiny_teacher()) as run:
        assert torch.equal(run.method._pairs.x0, own)
