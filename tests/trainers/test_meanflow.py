"""MeanFlow: its identity on exact mean velocities, its limit of flow matching, its derivative and its estimators."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_jumps import LAW, PROCESSES, ExactJump, exact_teacher
from short_runs import distance, gradients, shake, started
from torch import Tensor

import fastdiff.trainers.meanflow as meanflow_module
from fastdiff import Trainer
from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import MeanFlow
from fastdiff.trainers._jumps import FLOW, jump, mean_velocity
from fastdiff.trainers._plan import plan
from fastdiff.trainers.config import Config
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Calls, Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "distillation": MeanFlow(**_FEW, guidance_scale=2.0, jump_share=0.75, end_share=0.3, steps=2),
    "data": MeanFlow(**_FEW, kind="data", jvp="central", jump_share=0.75, weight_power=0.75, alpha_steps=1, lr=1e-3),
}
PLAIN = {"pairs": 64, "pair_steps": 8, "pair_guidance_scale": 1.0, "guidance_scale": 1.0, "jvp": "forward"}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exactly(run: Trainer, offset: Tensor | float = 0.0) -> None:
    """From now on the student of a run jumps exactly, but for ``offset`` on its mean velocity."""
    own = run._roles.denoiser
    exact = ExactJump(run.teacher.process, offset)
    run._roles.denoiser = lambda name: own(name) if name == "teacher" else exact  # type: ignore[method-assign]


def loss(run: Trainer, update: str = "meanflow") -> Tensor:
    (value,) = run.method.loss(update, run._micro_batches(0)[0], run._roles).values()
    return value


# --- the identity


@each_process
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_exact_mean_velocities_have_no_loss(process: Callable, share: float, tmp_path: Path, float64: None) -> None:
    """u = v - (t - r) du/dt to 1e-8, with the teacher's velocity and a duration that moves with t; 0.1 off it is not zero."""
    method = MeanFlow(**PLAIN, jump_share=share, end_share=0.2, weight_power=0.0)
    with started(method, tmp_path, exact_teacher(process()), batch_size=64) as run:
        exactly(run)
        assert loss(run) < 1e-16
        exactly(run, 0.1)
        assert loss(run) == pytest.approx(4 * 0.01, rel=0.1 if share < 1 else 1e-6)


def frozen_duration(student: Any, cond: Any) -> Any:
    """As if the duration did not move with t: its derivative would be left out."""
    u = mean_velocity(student, cond)
    return lambda x, s, d: u(x, s, d.detach())


def untold(student: Any, cond: Any) -> Any:
    """As if every sample were told to jump nowhere."""
    u = mean_velocity(student, cond)
    return lambda x, s, d: u(x, s, 0 * d)


@pytest.mark.parametrize("defect", [frozen_duration, untold])
def test_a_defect_of_the_told_duration_shows(defect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    method = MeanFlow(**PLAIN, jump_share=1.0, weight_power=0.0)
    with started(method, tmp_path, exact_teacher(PROCESSES["flow"]()), batch_size=64) as run:
        exactly(run)
        monkeypatch.setattr(meanflow_module, "mean_velocity", defect)
        assert loss(run) > 1e-3


def test_equal_times_are_flow_matching_in_value_and_gradient(tmp_path: Path, float64: None) -> None:
    method = MeanFlow(**PLAIN, weight_power=0.0)
    with started(method, tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        run._roles.train_only("student")
        batch = run._micro_batches(0)[0]
        t, _ = method.drawn_times(batch)
        method.drawn_times = lambda batch: (t, t)  # type: ignore[method-assign]
        got = loss(run)
        _, x0, cond = method.draw_pairs(batch)
        x_t = FLOW.add_noise(x0, batch.noise("eps"), t)
        v = LAW.under(FLOW).velocity(x_t, t)
        u = mean_velocity(run._roles.denoiser("student"), cond)(x_t, t, torch.zeros_like(t))
        want = (u - v).square().sum(1).mean()
        parameters = run._roles.parameters("student")
        one, other = (torch.autograd.grad(value, parameters) for value in (got, want))
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert want > 0.01
    assert distance(torch.cat([g.flatten() for g in one]), torch.cat([g.flatten() for g in other])) < 1e-9


def test_the_gradient_is_that_of_the_regression_to_the_target_by_hand(tmp_path: Path, float64: None) -> None:
    """The derivative by a difference along the path, r fixed; no gradient through it, v or the weight."""
    method = MeanFlow(**PLAIN, jump_share=1.0, end_share=0.2, weight_power=0.75, weight_offset=0.05)
    with started(method, tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        run._roles.train_only("student")
        batch = run._micro_batches(0)[0]
        t, r = method.drawn_times(batch)
        _, x0, cond = method.draw_pairs(batch)
        x_t = FLOW.add_noise(x0, batch.noise("eps"), t)
        v = LAW.under(FLOW).velocity(x_t, t)
        places, u = method._places, mean_velocity(run._roles.denoiser("student"), cond)
        h = 1e-5
        with torch.no_grad():
            here, behind = (u(x_t - s * v, t - s, places.of(t - s) - places.of(r)) for s in (0.0, h))
            target = v - expand(t - r, v) * (here - behind) / h
        prediction = u(x_t, t, places.of(t) - places.of(r))
        squared = (prediction - target).square().sum(1)
        want = (squared * (squared.detach() + 0.05) ** -0.75).mean()
        parameters = run._roles.parameters("student")
        one, other = (torch.autograd.grad(value, parameters) for value in (loss(run), want))
    assert distance(torch.cat([g.flatten() for g in one]), torch.cat([g.flatten() for g in other])) < 1e-3


# --- whose velocity, which times


def test_the_data_form_asks_no_teacher_and_follows_noise_to_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    velocities: list[Tensor] = []
    target = meanflow_module.meanflow_target
    monkeypatch.setattr(meanflow_module, "meanflow_target", lambda v, jvp, t, r: velocities.append(v) or target(v, jvp, t, r))
    with started(MeanFlow(**PLAIN, kind="data"), tmp_path, exact_teacher(PROCESSES["vp"]())) as run:
        loss(run)
        batch = run._micro_batches(0)[0]
        _, x0, _ = run.method.draw_pairs(batch)  # type: ignore[attr-defined]
        torch.testing.assert_close(velocities[0], batch.noise("eps") - x0)
        assert run._roles.ledger["teacher"] == 0
    assert MeanFlow(kind="data").calls(("meanflow",))["teacher"] == Calls(0, 0)
    assert (MeanFlow(guidance_scale=2.0).teacher_guidance(), MeanFlow(kind="data").teacher_guidance()) == (2.0, 3.0)


def test_times_are_two_sorted_logit_normals_equal_in_three_of_four(tmp_path: Path) -> None:
    n = 20_000
    with started(MeanFlow(**PLAIN, end_share=0.2), tmp_path, exact_teacher(PROCESSES["flow"]())) as run:
        batch = Batch(Draws(0, 0, 0, size=n, part=slice(n)), run.prompts, run.teacher)
        t, r = run.method.drawn_times(batch)  # type: ignore[attr-defined]
    assert (r <= t).all()
    assert abs((r < t).double().mean() - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    to_end = r == 0
    assert abs(to_end.double().mean() - 0.05) < 4 * (0.05 * 0.95 / n) ** 0.5
    for values, sign in ((t, 1), (r[(r < t) & ~to_end], -1)):  # the larger and the smaller of two normals: mean +- 1 / sqrt(pi)
        logit = values.logit()
        assert abs(logit.mean() + 0.4 - sign / torch.pi**0.5) < 4 * 0.83 / len(values) ** 0.5
        assert abs(logit.std() - (1 - 1 / torch.pi) ** 0.5) < 0.03


# --- alpha-Flow


def test_alpha_falls_and_hands_over_to_the_derivative() -> None:
    method = MeanFlow(alpha_steps=4, jvp="central")
    assert [method.alpha_at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert (method.updates(3), method.updates(4)) == (("alpha_flow",), ("meanflow",))
    assert [method.calls(method.updates(step))["student"] for step in (3, 4)] == [Calls(2, 1), Calls(3, 1)]
    assert MeanFlow(alpha_steps=4, alpha_floor=0.2).updates(100) == ("alpha_flow",)
    assert MeanFlow(alpha_steps=4, alpha_floor=0.2).alpha_at(100) == 0.2
    assert MeanFlow().updates(0) == ("meanflow",)


@each_process
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_two_jumps_of_exact_mean_velocities_are_one(process: Callable, alpha: float, tmp_path: Path, float64: None) -> None:
    """With the mean velocity over the first part in the place of v, as derived; with v itself it is MeanFlow's to order alpha."""
    with started(MeanFlow(**PLAIN, jump_share=1.0), tmp_path, exact_teacher(process()), batch_size=32) as run:
        method, batch = run.method, run._micro_batches(0)[0]
        t, r = method.drawn_times(batch)  # type: ignore[attr-defined]
        x_t, places = batch.noise("x"), method._places  # type: ignore[attr-defined]
        s, u = alpha * r + (1 - alpha) * t, mean_velocity(ExactJump(run.teacher.process), None)

        def to_end(x: Tensor, s: Tensor) -> Tensor:
            return u(x, s, places.of(s) - places.of(r))

        first = LAW.under(FLOW).mean_velocity(x_t, t, s)
        got = method.two_jumps(x_t, t, r, first, to_end, alpha)  # type: ignore[attr-defined]
        assert torch.allclose(got, to_end(x_t, t), atol=1e-8)
        v = LAW.under(FLOW).velocity(x_t, t)
        assert (method.two_jumps(x_t, t, r, v, to_end, alpha) - got).abs().max() > 1e-3  # type: ignore[attr-defined]


def test_at_a_small_alpha_the_gradient_tends_to_meanflows(tmp_path: Path, float64: None) -> None:
    """The target less u, divided by alpha, to MeanFlow's: u - target is alpha (u - v + (t - r) J) + O(alpha^2)."""
    with started(MeanFlow(**PLAIN, jump_share=1.0), tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        method, batch = run.method, run._micro_batches(0)[0]
        t, r = method.drawn_times(batch)  # type: ignore[attr-defined]
        x_t, places = batch.noise("x"), method._places  # type: ignore[attr-defined]
        v, u = LAW.under(FLOW).velocity(x_t, t), mean_velocity(run._roles.denoiser("student"), torch.full((16,), -1))

        def to_end(x: Tensor, s: Tensor) -> Tensor:
            return u(x, s, places.of(s) - places.of(r))

        prediction, _, jvp = method._estimator(to_end, (x_t, t), (v, torch.ones_like(t)))  # type: ignore[attr-defined]
        want = (prediction - meanflow_module.meanflow_target(v, jvp, t, r)).detach()
        errors = []
        for alpha in (1e-3, 5e-4):
            got = (prediction - method.two_jumps(x_t, t, r, v, to_end, alpha)).detach() / alpha  # type: ignore[attr-defined]
            errors.append(distance(got, want))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)


# --- the estimators


def test_all_estimators_give_one_gradient(tmp_path: Path, float64: None) -> None:
    fields: dict[str, Any] = {**PLAIN, "jump_share": 1.0}
    found = {}
    for name in ("forward", "central", "one-sided", "auto"):
        teacher = exact_teacher(PROCESSES["flow"]())
        with started(MeanFlow(**{**fields, "jvp": name}), tmp_path / name, teacher, batch_size=64) as run:
            shake(run)
            found[name] = gradients(run)["0 meanflow student"]
    errors = {name: distance(gradient, found["forward"]) for name, gradient in found.items()}
    assert errors["auto"] == 0
    assert 0 < errors["central"] < 1e-3
    assert 0 < errors["one-sided"] < 1e-3


@pytest.mark.parametrize(("jvp", "forwards"), [("auto", 2), ("forward", 2), ("one-sided", 2), ("central", 3)])
def test_every_estimator_costs_what_is_declared(jvp: Any, forwards: int, tmp_path: Path) -> None:
    assert MeanFlow(jvp=jvp).calls(("meanflow",))["student"] == Calls(forwards, 1)


def test_a_plan_counts_the_told_student(tmp_path: Path) -> None:
    config = Config(output_dir=tmp_path, batch_size=2)
    found = plan(MeanFlow(), Teacher.planned("fashion"), config, prompts=["a red boot"])
    assert found.unknown == found.refusals == []
    assert (found.updates["meanflow"].activations or 0) > 10**6
    assert found.roles["student"].parameters > found.roles["teacher"].parameters


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "both"},
        {"jvp": "backward"},
        {"log_std": 0.0},
        {"weight_offset": 0.0},
        {"jump_share": 0.0},
        {"end_share": 1.5},
        {"weight_power": -1.0},
        {"alpha_steps": -1},
        {"alpha_floor": 1.0},
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        MeanFlow(**fields)


def test_jumps_and_their_samples_use_one_formula() -> None:
    x, t = torch.ones(2, 3), torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert torch.equal(jump(x, t, torch.zeros_like(t), 2 * x), torch.tensor([[0.0], [-1.0]]).expand(2, 3))
