"""Shortcut models: two halves are one jump on an exact flow, the target by hand, and which rows get it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_jumps import LAW, PROCESSES, ExactJump, exact_teacher
from short_runs import listening, shake, started

from fastdiff import Trainer
from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.models.condition import split_guidance
from fastdiff.trainers import Shortcut
from fastdiff.trainers._jumps import FLOW, UNIT, mean_velocity
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Calls, Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "distillation": Shortcut(**_FEW, guidance_scale=2.0, steps=2, bootstrap_share=0.5, decay=0.5),
    "data": Shortcut(**_FEW, kind="data", finest=8, bootstrap_share=0.6, lr=1e-3),
}
PLAIN = {"pairs": 64, "pair_steps": 8, "pair_guidance_scale": 1.0, "guidance_scale": 1.0}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exactly(run: Trainer, **offsets: float) -> None:
    """From now on the networks of a run jump exactly, but for an offset on the mean velocity of those named."""
    own, process = run._roles.denoiser, run.teacher.process
    exact = {name: ExactJump(process, offsets.get(name, 0.0)) for name in ("student", "target")}
    run._roles.denoiser = lambda name: exact.get(name) or own(name)  # type: ignore[method-assign]


def loss(run: Trainer) -> float:
    return run.method.loss("student", run._micro_batches(0)[0], run._roles)["shortcut"].item()


# --- the identity


@each_process
def test_on_an_exact_flow_two_halves_are_one_jump(process: Callable, tmp_path: Path) -> None:
    """And the flow rows are the teacher's velocity: no row has a loss. The student 0.1 off has the square of it.

    But for the finest jumps, whose halves are taken for flow: there is a loss of 1e-5 in all.
    """
    method = Shortcut(**PLAIN, bootstrap_share=0.7)
    with started(method, tmp_path, exact_teacher(process()), batch_size=64) as run:
        exactly(run)
        t, duration, bootstrapped = method.drawn(run._micro_batches(0)[0])
        assert set(duration[bootstrapped].tolist()) >= {1.0, 0.5, 0.25, 0.125, 1 / 64}
        assert 1e-7 < loss(run) < 1e-4
        longer = duration.masked_fill(duration == 1 / 64, 0)
        method.drawn = lambda batch: (t, longer, longer > 0)  # type: ignore[method-assign]
        assert loss(run) < 1e-16
        exactly(run, student=0.1)
        assert loss(run) == pytest.approx(0.01, rel=1e-6)


@each_process
def test_the_target_of_two_halves_by_hand(process: Callable, tmp_path: Path) -> None:
    """On a straight path the mean of two velocities; elsewhere each weighs as long as its half is in flow time."""
    with started(Shortcut(**PLAIN), tmp_path, exact_teacher(process()), batch_size=4) as run:
        shake(run)
        method, places = run.method, run.method._places  # type: ignore[attr-defined]
        duration = torch.tensor([1.0, 0.5, 0.25, 1 / 64])
        p = torch.tensor([1.0, 1.0, 0.5, 1 / 64])
        x_t, cond = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), -1)
        t, m, r = (places.time(p - part * duration) for part in (0, 0.5, 1))
        got = method.two_halves(x_t, t, duration, cond, run._roles)  # type: ignore[attr-defined]
        u = mean_velocity(run._roles.denoiser("target"), cond)
        with torch.no_grad():
            told = torch.tensor([0.5, 0.25, 0.125, 0.0])  # the finest half is flow
            first = u(x_t, t, told)
            second = u(x_t - expand(t - m, x_t) * first, m, told)
        share = expand((t - m) / (t - r), x_t)
        want = share * first + (1 - share) * second
    assert torch.allclose(got, want, atol=1e-10)
    assert (first - second).abs().max() > 1e-3
    if isinstance(run.teacher.process, type(FLOW)):
        assert torch.allclose(got, (first + second) / 2, atol=1e-10)
    else:
        assert (share - 0.5).abs().max() > 0.05


def test_an_average_off_the_flow_moves_the_bootstrapped_rows_alone(tmp_path: Path) -> None:
    """0.1 on both halves is 0.1 on the target of the one jump, in those rows."""
    with started(Shortcut(**PLAIN, bootstrap_share=0.7), tmp_path, exact_teacher(PROCESSES["flow"]()), batch_size=64) as run:
        _, _, bootstrapped = run.method.drawn(run._micro_batches(0)[0])  # type: ignore[attr-defined]
        exactly(run, student=0.1, target=0.1)
        off = loss(run)
    share = bootstrapped.double().mean().item()
    assert 0.5 < share < 0.9
    assert off < 0.01  # the trajectory from the displaced middle is another, so rows of target and student differ by less than 0.1
    assert off > 0.009 * (1 - share)


# --- the rows


def test_one_row_in_eight_is_bootstrapped_at_multiples_of_its_jump(tmp_path: Path) -> None:
    n = 40_000
    with started(Shortcut(**PLAIN), tmp_path, exact_teacher(PROCESSES["vp"]())) as run:
        batch = Batch(Draws(0, 0, 0, size=n, part=slice(n)), run.prompts, run.teacher)
        t, duration, bootstrapped = run.method.drawn(batch)  # type: ignore[attr-defined]
        places = run.method._places  # type: ignore[attr-defined]
    assert abs(bootstrapped.double().mean() - 1 / 8) < 4 * (7 / 64 / n) ** 0.5
    assert (duration[~bootstrapped] == 0).all()
    sizes, counts = duration[bootstrapped].unique(return_counts=True)
    assert sizes.tolist() == [2.0**-k for k in range(6, -1, -1)]
    assert (counts / counts.sum() - 1 / 7).abs().max() < 4 * (6 / 49 / counts.sum()) ** 0.5
    multiple = places.of(t[bootstrapped]) / duration[bootstrapped]
    assert (multiple - multiple.round()).abs().max() < 1e-9
    assert multiple.round().min() == 1
    assert places.of(t[bootstrapped]).max() == pytest.approx(1, abs=1e-12)
    flow = t[~bootstrapped]
    assert abs(flow.mean() - (places.low + places.high) / 2) < 4 * (places.high - places.low) / (12 * len(flow)) ** 0.5


def test_student_and_average_are_told_their_own_jumps(tmp_path: Path) -> None:
    method = Shortcut(**PLAIN, bootstrap_share=0.7)
    with started(method, tmp_path, exact_teacher(PROCESSES["flow"]()), batch_size=16) as run, listening(run) as calls:
        _, duration, _ = method.drawn(run._micro_batches(0)[0])
        loss(run)
    said = {call.role: [] for call in calls}
    for call in calls:
        said[call.role].append(None if split_guidance(call.cond)[1] is None else (split_guidance(call.cond)[1] - 1) / UNIT)
    halves = torch.where(duration / 2 > 1 / 128, duration / 2, 0.0)
    assert torch.allclose(said["student"][0], duration, atol=1e-12)
    assert all(torch.allclose(one, halves, atol=1e-12) for one in said["target"])
    assert len(said["target"]) == 2


def test_the_data_form_asks_no_teacher(tmp_path: Path) -> None:
    """Its flow rows: the exact student has the variance of eps - x0 given x_t for a loss, by hand."""
    with started(Shortcut(**PLAIN, kind="data"), tmp_path, exact_teacher(PROCESSES["flow"]()), batch_size=64) as run:
        exactly(run)
        batch = run._micro_batches(0)[0]
        t, _, bootstrapped = run.method.drawn(batch)  # type: ignore[attr-defined]
        _, x0, _ = run.method.draw_pairs(batch)  # type: ignore[attr-defined]
        eps = batch.noise("eps")
        error = LAW.under(FLOW).velocity(FLOW.add_noise(x0, eps, t), t) - (eps - x0)
        want = (error.square().mean(1) * ~bootstrapped).mean().item()
        assert loss(run) == pytest.approx(want, rel=1e-6)
        assert run._roles.ledger["teacher"] == 0
    assert Shortcut(kind="data").calls(("student",))["teacher"] == Calls(0, 0)


def test_the_average_follows_the_student(tmp_path: Path) -> None:
    with started(Shortcut(**PLAIN, decay=0.75), tmp_path, exact_teacher(PROCESSES["flow"]()), warmup_steps=0) as run:
        shake(run)
        before = [p.clone() for p in run._roles.parameters("target")]
        run.advance()
        for old, leader, now in zip(before, run._roles.parameters("student"), run._roles.parameters("target"), strict=True):
            assert torch.allclose(now, 0.75 * old + 0.25 * leader, atol=1e-12)
            assert not torch.equal(now, old)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "both"},
        {"finest": 100},
        {"finest": 1024},
        {"steps": 3},
        {"steps": 8, "finest": 8},
        {"bootstrap_share": 1.0},
        {"decay": 1.0},
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        Shortcut(**fields)
