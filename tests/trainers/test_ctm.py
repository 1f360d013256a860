"""CTM: its limits, its zero on the exact flow map, its adaptive weight and gamma-sampling."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_jumps import LAW, PROCESSES, ExactJump, exact_teacher
from short_runs import distance, listening, shake, started
from tiny import tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.diffusion.matching import match_state
from fastdiff.diffusion.process import LEVELS, DiscreteVP
from fastdiff.diffusion.renoising import consistency_step
from fastdiff.errors import UserError
from fastdiff.trainers import CTM, Shortcut
from fastdiff.trainers._balance import Balance
from fastdiff.trainers._jumps import FLOW, told
from fastdiff.trainers.ctm import Triple
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Calls, Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "guided": CTM(**_FEW, guidance_scale=2.0, steps=2, decay=0.5),
    "consistency-alone": CTM(**_FEW, guidance_scale=2.0, grid_size=10, solver_steps=1, denoising_weight=0.0, gamma=0.5, lr=1e-3),
}
PLAIN = {"pairs": 64, "pair_steps": 8, "pair_guidance_scale": 1.0, "guidance_scale": 1.0}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exactly(run: Trainer, offset: Tensor | float = 0.0) -> None:
    """From now on student and average of a run jump exactly, but for ``offset`` on the student's mean velocity."""
    own, process = run._roles.denoiser, run.teacher.process
    exact = {"student": ExactJump(process, offset), "target": ExactJump(process)}
    run._roles.denoiser = lambda name: exact.get(name) or own(name)  # type: ignore[method-assign]


def along_the_law(x_t: Tensor, at: Triple, *rest: Any) -> Tensor:
    """The exact teacher step."""
    return LAW.under(FLOW).flow_map(x_t, at.t, at.s)


def soft(run: Trainer, at: Triple | None = None) -> tuple[Tensor, Tensor, Triple, Any]:
    """The soft consistency of the first batch, and x_t, times and condition of it."""
    method, batch = run.method, run._micro_batches(0)[0]
    assert isinstance(method, CTM)
    at = at or method.triple(batch)
    _, x0, cond = method.draw_pairs(batch)
    x_t = FLOW.add_noise(x0, batch.noise("eps"), at.t)
    return method.soft_consistency(x_t, at, cond, batch, run._roles), x_t, at, cond


def flat(gradients: tuple[Tensor | None, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


# --- the soft consistency


@each_process
def test_the_exact_flow_map_with_an_exact_step_has_no_loss(
    process: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the teacher's Heun steps, which are not exact, leave some, as does another student."""
    with started(CTM(**PLAIN), tmp_path, exact_teacher(process()), batch_size=64) as run:
        offset = torch.zeros(4, requires_grad=True)
        exactly(run, offset)
        by_heun = soft(run)[0].item()
        monkeypatch.setattr(run.method, "teacher_step", along_the_law)
        exact = soft(run)[0]
        (gradient,) = torch.autograd.grad(exact, offset)
        exactly(run, offset + 0.3)
        other = soft(run)[0].item()
    assert exact.item() < 1e-16
    assert gradient.abs().max() < 1e-9
    assert 1e-12 < by_heun < 1e-3
    assert other > 1e-2


@each_process
def test_the_teachers_heun_steps_are_of_second_order(process: Callable, tmp_path: Path) -> None:
    errors = []
    with started(CTM(**PLAIN), tmp_path, exact_teacher(process()), batch_size=64) as run:
        method, batch = run.method, run._micro_batches(0)[0]
        _, x0, cond = method.draw_pairs(batch)  # type: ignore[attr-defined]
        times = (method._places.time(torch.full((64,), p)) for p in (0.9, 0.5, 0.0))  # type: ignore[attr-defined]
        at = Triple(*times)
        x_t = FLOW.add_noise(x0, batch.noise("eps"), at.t)
        for method.solver_steps in (8, 16):  # type: ignore[attr-defined]
            got = method.teacher_step(x_t, at, cond, batch, run._roles)  # type: ignore[attr-defined]
            errors.append((got - along_the_law(x_t, at)).norm())
    assert 3 < errors[0] / errors[1] < 5.5


def test_a_jump_to_its_own_time_is_the_state_itself_to_the_bit(tmp_path: Path) -> None:
    with started(CTM(**PLAIN), tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        _, x_t, at, cond = soft(run)
        jumps = run.method.jumps(run._roles.denoiser("student"), cond)  # type: ignore[attr-defined]
        zero = torch.zeros_like(at.t)
        assert torch.equal(jumps(x_t, at.t, at.t), x_t)
        assert torch.equal(jumps(x_t, zero, zero), x_t)
        assert (jumps(x_t, at.t, at.u) - x_t).abs().max() > 0.1


@pytest.mark.parametrize("limit", ["consistency distillation", "regression on the step"])
def test_its_limits(limit: str, tmp_path: Path) -> None:
    """u = 0: both sides are a single jump to the end. u = s: the aim is the teacher's own state, taken to the end."""
    with started(CTM(**PLAIN), tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        run._roles.train_only("student")
        drawn = run.method.triple(run._micro_batches(0)[0])  # type: ignore[attr-defined]
        zero = torch.zeros_like(drawn.t)
        at = Triple(drawn.t, drawn.s, zero if limit.startswith("consistency") else drawn.s)
        got, x_t, _, cond = soft(run, at)
        x_s = run.method.teacher_step(x_t, at, cond, run._micro_batches(0)[0], run._roles)  # type: ignore[attr-defined]
        student, average = (run.method.jumps(run._roles.denoiser(n), cond) for n in ("student", "target"))  # type: ignore[attr-defined]
        if limit.startswith("consistency"):
            prediction, aim = student(x_t, at.t, zero), average(x_s, at.s, zero)
        else:
            prediction, aim = average(student(x_t, at.t, at.s), at.s, zero), average(x_s, at.s, zero)
        want = (prediction - aim.detach()).square().mean()
        parameters = run._roles.parameters("student")
        one, other = (flat(torch.autograd.grad(value, parameters)) for value in (got, want))
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert want > 1e-3
    assert distance(one, other) < 1e-9


def test_the_gradient_comes_back_through_the_average_and_stops_at_the_student(tmp_path: Path) -> None:
    with started(CTM(**PLAIN), tmp_path, exact_teacher(PROCESSES["vp"]()), batch_size=16) as run:
        shake(run)
        run._roles.train_only("student")
        got, x_t, at, cond = soft(run)
        student, average = (run.method.jumps(run._roles.denoiser(n), cond) for n in ("student", "target"))  # type: ignore[attr-defined]
        zero, own = torch.zeros_like(at.t), run._roles.parameters("student")
        with torch.no_grad():
            x_s = run.method.teacher_step(x_t, at, cond, run._micro_batches(0)[0], run._roles)  # type: ignore[attr-defined]
            aim = average(average(x_s, at.s, at.u), at.u, zero)
        want = (average(student(x_t, at.t, at.u), at.u, zero) - aim).square().mean()
        one, other = (flat(torch.autograd.grad(value, own, retain_graph=True)) for value in (got, want))
        assert distance(one, other) < 1e-9
        got.backward()
        assert all(p.grad is None for p in run._roles.parameters("target"))


def test_triples_are_ordered_places_of_the_grid(tmp_path: Path) -> None:
    n = 20_000
    with started(CTM(**PLAIN, solver_steps=3), tmp_path, exact_teacher(PROCESSES["flow"]())) as run:
        at = run.method.triple(Batch(Draws(0, 0, 0, size=n, part=slice(n)), run.prompts, run.teacher))  # type: ignore[attr-defined]
    t, s, u = (18 * times for times in (at.t, at.s, at.u))
    assert all((times - times.round()).abs().max() < 1e-9 for times in (t, s, u))
    t, s, u = t.round(), s.round(), u.round()
    assert (t - s).unique().tolist() == [1, 2, 3]
    assert ((s >= u) & (u >= 0)).all()
    assert t.unique().tolist() == list(range(1, 19))
    at_top = t == 18
    assert abs(((t - s)[at_top] == 3).double().mean() - 1 / 3) < 4 * (2 / 9 / at_top.sum()) ** 0.5
    of_15 = at_top & (s == 15)
    assert abs((u[of_15] == 0).double().mean() - 1 / 16) < 4 * (15 / 256 / of_15.sum()) ** 0.5


# --- the denoising term and its weight


def test_the_denoising_term_of_the_exact_denoiser_is_the_least_there_is(tmp_path: Path) -> None:
    """By hand, and no gradient of a constant offset but what chance leaves; told to jump nowhere."""
    with started(CTM(**PLAIN), tmp_path, exact_teacher(PROCESSES["flow"]()), batch_size=64) as run, listening(run) as calls:
        shake(run)
        method, batch = run.method, run._micro_batches(0)[0]
        _, x0, cond = method.draw_pairs(batch)  # type: ignore[attr-defined]
        got = method.denoising(x0, cond, batch, run._roles)  # type: ignore[attr-defined]
        (call,) = calls
        assert (call.cond["guidance_scale"] == 1).all()
        t = call.t / 1000
        want = run._roles.denoiser("student")(call.x_t, t, call.cond).x0
    assert got.item() == pytest.approx((want - x0).square().mean().item(), rel=1e-9)
    torch.testing.assert_close(call.x_t, FLOW.add_noise(x0, batch.noise("denoising_eps"), t))
    assert 0.001 <= t.min() <= t.max() <= 1


def test_lambda_is_the_ratio_of_pulls_on_the_last_layer_of_the_iteration_before(tmp_path: Path) -> None:
    with started(CTM(**PLAIN), tmp_path, tiny_teacher(), batch_size=4, warmup_steps=0) as run:
        shake(run)
        run._roles.train_only("student")
        batch, weight = run._micro_batches(0)[0], run._roles.modules["balance"].weight
        assert weight == 1
        terms = run.method.loss("student", batch, run._roles)
        last = run._roles.modules["student"].conv_out.weight
        consistency, denoising = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in terms.values())
        run.advance()
        assert weight.item() == pytest.approx((consistency / denoising).item(), rel=1e-6)
        assert not 0.99 < weight.item() < 1.01
        batch = run._micro_batches(1)[0]
        _, x0, cond = run.method.draw_pairs(batch)  # type: ignore[attr-defined]
        plain = run.method.denoising(x0, cond, batch, run._roles)  # type: ignore[attr-defined]
        assert run.method.loss("student", batch, run._roles)["denoising"].item() == pytest.approx((weight * plain).item(), rel=1e-6)


def test_lambda_is_clipped_and_keeps_its_value_where_there_is_none() -> None:
    balance = Balance()
    for first, second, want in ((3.0, 4.0, 0.75), (1.0, 1e-9, 10.0), (1e-9, 1.0, 0.01), (torch.nan, 1.0, 0.01)):
        balance.settle(torch.tensor([[first, 0.0], [0.0, second]]))
        assert balance.weight.item() == pytest.approx(want)


# --- sampling


def student_of(process: Any) -> ExactJump:
    """Off the exact jumps, or every gamma would give the same law."""
    return ExactJump(process, 0.1)


def noises(n: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), generator


@each_process
def test_gamma_0_is_ddim(process: Callable) -> None:
    noise, generator = noises(5)
    ddim = Shortcut(steps=4).sample(student_of(process()), noise, None)
    almost = CTM(steps=4, gamma=1e-9).sample(student_of(process()), noise, None, generator)
    assert torch.equal(CTM(steps=4).sample(student_of(process()), noise, None), ddim)
    assert torch.allclose(almost, ddim, atol=1e-6)


@each_process
def test_gamma_1_goes_to_the_end_and_draws_all_noise_anew_as_lcm(process: Callable) -> None:
    noise, generator = noises(5)
    got = CTM(steps=2, gamma=1.0).sample(student_of(process()), noise, None, generator)
    view = process().continuous() if isinstance(process(), DiscreteVP) else process()
    student, fresh = student_of(view), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    first, second = (view.at_level(torch.full((5,), level)) for level in (LEVELS - 1, LEVELS // 2 - 1))
    x0 = student(noise, first, told(None, torch.ones(5)))
    x = consistency_step(x0, second, fresh)
    want = student(x, second, told(None, torch.full((5,), 0.5))).x0
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
def test_fresh_noise_has_gamma_of_the_next_times_deviation(gamma: float) -> None:
    """Of one start, the state before the last call has standard deviation gamma r in noise-to-signal time."""
    seen: list[Tensor] = []

    class Watched(ExactJump):
        def continuous(self) -> "Watched":
            return self

        def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Any:
            seen.append(match_state(x_t, t, self.process, FLOW)[0] / (1 - 0.5))
            return super().__call__(x_t, t, cond)

    noise, generator = noises(1)
    CTM(steps=2, gamma=gamma).sample(Watched(FLOW), noise.expand(20_000, 4), None, generator)
    assert seen[1].std(0).mean() == pytest.approx(gamma * 1.0, rel=0.02)


def test_fresh_noise_is_refused_where_no_pipeline_could_tell_each_call_its_jump(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fashion does: at gamma=0.5 with 2 steps"):
        Trainer(CTM(steps=2, gamma=0.5), tiny_teacher(), output_dir=tmp_path)
    Trainer(CTM(gamma=0.5), tiny_teacher(), output_dir=tmp_path)
    Trainer(CTM(steps=2, gamma=0.5), exact_teacher(FLOW), output_dir=tmp_path)


# --- what it costs, and what it refuses


def test_what_it_asks_by_its_settings() -> None:
    assert CTM(guidance_scale=1.0).calls(("student",)) == {"student": Calls(2, 4), "target": Calls(3, 1), "teacher": Calls(4, 0)}
    assert CTM(denoising_weight=0, solver_steps=1).calls(("student",))["student"] == Calls(1, 1)
    assert CTM().calls(("student",))["teacher"] == Calls(8, 0)
    assert "balance" not in CTM(denoising_weight=0).roles()


@pytest.mark.parametrize(
    "fields",
    [{"solver_steps": 0}, {"solver_steps": 4, "grid_size": 3}, {"decay": 1.0}, {"denoising_weight": -1.0}, {"gamma": 1.1}],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        CTM(**fields)
