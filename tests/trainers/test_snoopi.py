"""SNOOPI: one kappa for both teachers, drawn anew in every iteration."""

from pathlib import Path

import pytest
import torch
from short_runs import distance, gradients, listening, shake, started

from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import SNOOPI, SwiftBrush
from fastdiff.trainers.method import Batch, Method

TINY = {"rank": 4, "lora_alpha": 8.0, "pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "range-warm": SNOOPI(null_probability=1.0, warm_start_steps=2, **TINY),
    "clip": SNOOPI(guidance_range=(0.5, 3.0), clip_weight=0.1, clip_threshold=0.9, clip_decay_steps=50, **TINY),
}


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_range_of_one_kappa_is_swiftbrush_with_it(scale: float, tmp_path: Path) -> None:
    """At 1: variational score distillation without guidance, and nobody asks about the null prompt."""
    found = []
    for method in (
        SNOOPI(guidance_range=(scale, scale), **TINY),
        SwiftBrush(guidance_scale=scale, **TINY),
    ):
        with started(method, tmp_path / method.name()) as run, listening(run) as calls:
            shake(run)
            found.append(gradients(run))
            assert {len(call.x_t) for call in calls if call.role == "teacher"} == {4 if scale == 1 else 8}
    first, second = found
    for key, gradient in first.items():
        assert torch.equal(gradient.nan_to_num(), second[key].nan_to_num())


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5])
def test_the_gradient_is_affine_guidance_of_both_networks_by_the_same_kappa(step: int, tmp_path: Path) -> None:
    """Recomputed from single passes of the networks, also where kappa is below 1."""
    method = SNOOPI(**TINY)
    with started(method, tmp_path) as run:
        shake(run)
        batch, roles, process = run._micro_batches(step)[0], run._roles, run.teacher.process
        k = 0.5 + 3.5 * batch.draws.choice("kappa")
        got = run.method.loss("student", batch, roles)["vsd"].item()
        x, t, eps = batch.memo["x"], batch.times("student_t", 20, 980), batch.noise("student_eps")
        x_t, e = process.add_noise(x, eps, t), {}
        with torch.no_grad():
            for name in ("teacher", "fake_score"):
                net = roles.network(name)
                e[name] = (1 - k) * net(x_t, t, batch.null) + k * net(x_t, t, batch.cond)
        want = 0.5 * (expand(process.sigma(t).square(), x) * (e["teacher"] - e["fake_score"])).square().mean()
    assert got == pytest.approx(want.item(), rel=1e-4)


def test_kappa_is_uniform_on_its_range_and_equal_on_all_ranks(tmp_path: Path) -> None:
    method = SNOOPI(**TINY)
    with started(method, tmp_path, batch_size=2, accumulation=2) as run:
        drawn = [[method.scale(batch) for batch in run._micro_batches(step)] for step in range(2000)]
        other = run._micro_batches(7)[0]
        other.draws.key = (other.draws.key[0], 1, other.draws.key[2])
        assert method.scale(other) == drawn[7][0]
    assert all(len(set(micro)) == 1 for micro in drawn)
    values = torch.tensor(drawn)[:, 0]
    assert 0.5 <= values.min() < 0.52
    assert 3.98 < values.max() <= 4.0
    assert abs(values.mean() - 2.25) < 4 * 3.5 / 12**0.5 / 2000**0.5
    assert abs((values < 1).double().mean() - 1 / 7) < 4 * (6 / 49 / 2000) ** 0.5


def test_with_one_kappa_for_both_the_optimum_is_at_rest_at_every_kappa() -> None:
    method = SNOOPI()
    for seed in range(5):
        at_rest = Setting(seed=seed)
        assert sample_gradients(method, at_rest)[0].abs().max() < 1e-10
        assert sample_gradients(method, Setting(shift=0.3, spread=1.2, seed=seed))[0].abs().max() > 1e-2


def test_a_kappa_for_each_network_would_never_come_to_rest() -> None:
    """What the shared draw prevents: (kappa - kappa') times the direction of guidance is left at the optimum."""
    asked = []

    class Counted(SNOOPI):
        def scale(self, batch: Batch) -> float:
            asked.append(super().scale(batch))
            return asked[-1]

    method = Counted()
    _, batch, roles = sample_gradients(method, Setting())
    assert len(asked) == 1  # one kappa for both networks
    t, x_t = method.times("student_t", batch), batch.noise("student_eps")
    unlike = (("teacher", 0.5), ("fake_score", 4.0))
    real, fake = (roles.denoiser(name).guided(x_t, t, batch.cond, batch.null, k) for name, k in unlike)
    assert (real.eps - fake.eps).abs().max() > 0.1


def test_the_clip_term_is_added_only_where_it_is_asked_for(tmp_path: Path) -> None:
    with started(SNOOPI(**TINY), tmp_path / "off") as run:
        shake(run)
        plain = gradients(run)
        assert set(run.method.loss("student", run._micro_batches(0)[0], run._roles)) == {"vsd"}
    with started(SNOOPI(clip_weight=0.1, clip_threshold=0.9, **TINY), tmp_path / "on") as run:
        shake(run)
        assert set(run.method.loss("student", run._micro_batches(0)[0], run._roles)) == {"vsd", "clip"}
        assert distance(gradients(run)["0 student student"], plain["0 student student"]) > 1e-4
    assert SNOOPI().clip_threshold == 0.37


def test_ranges_that_cannot_be_are_refused() -> None:
    for low_high in ((4.0, 0.5), (-1.0, 2.0)):
        with pytest.raises(UserError, match="guidance_range"):
            SNOOPI(guidance_range=low_high)
