"""PeRFlow: its windows and lines, one teacher step as a special case, exact students, and sampling across the edges."""

from pathlib import Path

import pytest
import torch
from short_runs import listening, shake, started
from tiny import tiny_teacher
from torch import Tensor

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, LEVELS, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.solvers import ddim_step, ddim_target
from fastdiff.diffusion.straight import flow_velocity, flow_weight
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import PeRFlow
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Method
from fastdiff.trainers.trajectory import trajectory

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {"guided": PeRFlow(guidance_scale=2.0, window_steps=2, windows=2, window_calls=2, **PAIRS)}
PROCESSES = {"vp": laws.process(), "edm": EDM(), "flow": RectifiedFlow(), "trigflow": TrigFlow()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


class Double(Draws):
    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).double()


def gaussian_run(process: NoiseProcess, folder: Path, **fields: int):  # type: ignore[no-untyped-def]
    law = Gaussian.anisotropic(process, d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    method = PeRFlow(guidance_scale=1.0, pairs=200, pair_steps=2, pair_guidance_scale=1.0, **fields)
    return law, started(method, folder, teacher, batch_size=200)


def in_double(run):  # type: ignore[no-untyped-def]
    (batch,) = run._micro_batches(0)
    batch.draws.__class__ = Double
    pairs = run.method._pairs
    run.method._pairs = type(pairs)(pairs.noise.double(), pairs.x0.double(), pairs.prompt)
    return batch


# --- windows


def test_windows_have_equally_many_levels_and_the_student_s_times_are_trained_ones(tmp_path: Path) -> None:
    method = PeRFlow(window_calls=2)
    assert method.edges() == [999, 749, 499, 249]
    assert method.levels() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert method.grid()[::2] == method.levels()
    with started(PeRFlow(**PAIRS), tmp_path) as run:
        times = run.method.times_of(torch.arange(4), run._micro_batches(0)[0])
    assert [t.tolist() for t in times] == [
        [999, 749, 499, 249],
        [937, 687, 437, 187],
        [874, 624, 374, 124],
        [811, 561, 311, 61],
        [749, 499, 249, 0],
    ]


@each_process
def test_a_line_meets_the_teacher_at_both_edges_of_its_window(process: NoiseProcess, tmp_path: Path) -> None:
    law, running = gaussian_run(process, tmp_path, window_steps=2)
    with running as run:
        batch = in_double(run)
        window = torch.arange(200) % 4
        times = run.method.times_of(window, batch)
        edges = torch.tensor([*run.method.edges(), 0])
        assert torch.equal(times[0], process.at_level(edges[window]))
        assert torch.equal(times[-1], process.at_level(edges[window + 1]))
        x = process.add_noise(run.method.draw_pairs(batch)[1], batch.noise("eps"), times[0])
        line = run.method.line(x, window, times, batch.cond, batch, run._roles)
        state = x
        for t, u in zip(times[:-1], times[1:], strict=True):
            said = law(state, t)
            state = ddim_step(said, u)
        inner = window < 3
        assert torch.allclose(ddim_step(line, times[0]), x, rtol=0, atol=1e-9 * x.abs().max().item())
        assert torch.allclose(ddim_step(line, times[-1])[inner], state[inner], rtol=1e-9, atol=1e-9)
        assert torch.equal(line.x0[~inner], said.x0[~inner])


# --- the loss


def test_with_one_step_a_window_it_is_regression_on_the_teacher_s_own_step(tmp_path: Path) -> None:
    """The target is the teacher's guided x0 where the window starts, and the unguided teacher's own network has no loss."""
    losses = []
    for steps, scale in ((1, 3.0), (1, 1.0), (2, 1.0)):
        method = PeRFlow(guidance_scale=scale, window_steps=steps, **PAIRS)
        with started(method, tmp_path / f"{steps}-{scale}", batch_size=16) as run:
            batch, process = run._micro_batches(0)[0], run.teacher.process
            losses.append(method.loss("student", batch, run._roles)["perflow"].item())
            if scale == 1:
                continue
            _, x0, cond = method.draw_pairs(batch)
            start = process.at_level(torch.tensor([999, 749, 499, 249])[batch.draws.integers("window", 0, 4)])
            x = process.add_noise(x0, batch.noise("eps"), start)
            said, student = (run.teacher.denoiser.guided(x, start, cond, batch.null, s).x0 for s in (3.0, 1.0))
            want = (expand(flow_weight(process, start), x0) * (student - said).square()).mean()
            assert losses[0] == pytest.approx(want.item(), rel=1e-3)
    assert losses[1] < 1e-6 * losses[2]


def test_the_loss_is_the_squared_error_of_the_flow_velocity_on_the_line(tmp_path: Path) -> None:
    with started(PeRFlow(**PAIRS), tmp_path, tiny_teacher(prediction_type="v_prediction"), batch_size=16) as run:
        shake(run)
        batch, roles, process = run._micro_batches(0)[0], run._roles, run.teacher.process
        got = run.method.loss("student", batch, roles)["perflow"]
        _, x0, cond = run.method.draw_pairs(batch)
        window, place = batch.draws.integers("window", 0, 4), batch.draws.integers("place", 0, 4)
        times = run.method.times_of(window, batch)
        x = process.add_noise(x0, batch.noise("eps"), times[0])
        line, t = run.method.line(x, window, times, cond, batch, roles), torch.tensor(run.method.grid())[4 * window + place]
        a, s = (expand(c(t), x0) for c in (process.alpha, process.sigma))
        student = roles.denoiser("student")(a * line.x0 + s * line.eps, t, cond)
        error = flow_velocity(student) - flow_velocity(line)
    assert got.item() == pytest.approx(error.square().mean().item(), rel=1e-3)
    assert got > 0.1


class ExactWindows(Denoiser):
    """The x0~ of the exact line through x_t in its window, for a Gaussian; ``scale`` makes it wrong.

    Along a principal axis x_e = a_e m + g (x_k - a_k m), the line's ends; x_t is affine in x_k, which is solved for.
    """

    def __init__(self, law: Gaussian, method: PeRFlow, scale: float = 1.0) -> None:
        super().__init__(lambda x_t, t, cond: x_t, law.process, "sample")
        self.law, self.method, self.scale = law, method, scale

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        process, edges = self.process, torch.tensor(self.method.edges())
        window = (process.at_level(edges)[None].double() >= t[:, None].double() - 1e-9).sum(1) - 1
        last = (window == self.method.windows - 1)[:, None]
        first, end = (process.at_level(torch.tensor([*self.method.edges(), 0])[window + i]) for i in (0, 1))
        (a_k, s_k), (a_e, s_e), (a, s) = ([expand(c(u), x_t) for c in (process.alpha, process.sigma)] for u in (first, end, t))
        a_e, s_e = torch.where(last, 1.0, a_e), torch.where(last, 0.0, s_e)
        mean, values, basis = self.law.means[0], self.law.variances, self.law.basis[0]
        growth = ((a_e**2 * values + s_e**2) / (a_k**2 * values + s_k**2)).sqrt()
        k = (growth - s_e / s_k) / (a_e - a_k * s_e / s_k)  # x0~ - m by x_k - a_k m
        slope = (a - s / s_k * a_k) * k + s / s_k
        x0 = mean + (k / slope * ((x_t - a * mean) @ basis)) @ basis.T
        return Prediction(x_t, t, self.scale * x0, process)


@each_process
def test_an_exact_student_has_no_loss_on_exact_steps_and_samples_the_exact_map(
    process: NoiseProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law, running = gaussian_run(process, tmp_path, window_calls=2, window_steps=4)
    with running as run:
        losses, batch, roles, method = [], in_double(run), run._roles, run.method

        def exact_line(x: Tensor, window: Tensor, times: list[Tensor], *_: object) -> Prediction:
            first, end = times[0], times[-1]
            state = law.flow_map(x, first, end)
            x0 = torch.where((window == 3)[:, None], law.flow_map(x, first, None), ddim_target(x, first, state, end, process))
            return Prediction(x, first, x0, process)

        monkeypatch.setattr(method, "line", exact_line)
        for scale in (1.0, 1.1):
            roles.denoiser = lambda name, scale=scale: ExactWindows(law, method, scale)
            losses.append(method.loss("student", batch, roles)["perflow"].item())
    assert losses[0] < 1e-12 < 1e-3 < losses[1]
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = process.initial_scale * noise
    want = law.flow_map(x, process.at_level(torch.full((50,), LEVELS - 1)), None)
    for levels in (method.levels(), method.edges()):
        assert (trajectory(ExactWindows(law, method), noise, None, levels, "ddim")[-1].x0 - want).abs().max() < 1e-8


def test_the_teacher_is_asked_at_its_own_times_within_the_window(tmp_path: Path) -> None:
    with started(PeRFlow(guidance_scale=1.0, window_steps=2, **PAIRS), tmp_path, batch_size=32) as run, listening(run) as calls:
        run.method.loss("student", run._micro_batches(0)[0], run._roles)
    asked = [call.t for call in calls if call.role == "teacher"]
    assert len(asked) == 2
    assert set(asked[0].tolist()) == {999, 749, 499, 249}
    assert set((asked[0] - asked[1]).tolist()) == {125}


@pytest.mark.parametrize(
    "fields",
    [
        {"windows": 0},
        {"window_steps": 0},
        {"window_calls": 0},
        {"window_steps": 6, "windows": 100},
        {"window_calls": 3},
        {"windows": 48, "window_steps": 5},
        {"lr": 0.0},
    ],
)
def test_settings_without_meaning_are_refused(fields: dict[str, int]) -> None:
    """Three calls are not at the times of four teacher steps; 48 windows of 5 steps do not begin at any of theirs."""
    with pytest.raises(UserError, match=next(iter(fields))):
        PeRFlow(**fields)  # type: ignore[arg-type]
