"""Reflow: exact on affine couplings, its loss by hand, its stages, and the straightness that it brings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import shake, started
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.data.pairs import Pairs
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.matching import SNRMatched
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, LEVELS, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.solvers import ddim_sample, trailing_times
from fastdiff.diffusion.straight import flow_time, flow_velocity, straightness
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.law import LawDenoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.few_step import ddim_scheduler
from fastdiff.pipelines.one_step import one_step_scheduler
from fastdiff.proof import laws
from fastdiff.trainers import Reflow
from fastdiff.trainers.method import Method
from fastdiff.trainers.trajectory import trajectory

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "two-steps": Reflow(steps=2, lr=1e-3, **PAIRS),
    "three-stages": Reflow(rounds=2, distill=True, round_steps=1, repeat_steps=2, **PAIRS),
}
PROCESSES = {"vp": laws.process(), "edm": EDM(), "flow": RectifiedFlow(), "trigflow": TrigFlow()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


# --- a Gaussian, whose flow map is affine


class ExactLines(Denoiser):
    """The end of the exact line through x_t, for the coupling x0 = Phi(x_T) of a Gaussian; ``scale`` makes it wrong.

    Along a principal axis of the law, x0 = m + k (x_T - a_T m) and x_t = a_t x0 + s_t (x_T - a_T x0) / s_T.
    """

    def __init__(self, law: Gaussian, scale: float = 1.0) -> None:
        super().__init__(lambda x_t, t, cond: x_t, law.process, "sample")
        self.law, self.scale = law, scale

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        top, basis, mean = self.process.at_level(torch.tensor(LEVELS - 1)), self.law.basis[0], self.law.means[0]
        a_top, s_top = self.process.alpha(top), self.process.sigma(top)
        a, s = (expand(c(t), x_t) for c in (self.process.alpha, self.process.sigma))
        k = (self.law.variances[0] / (a_top**2 * self.law.variances[0] + s_top**2)).sqrt()
        ratio = s / s_top
        slope = (a - ratio * a_top) * k + ratio  # of x_t by x_T
        x0 = mean + k / slope * ((x_t - a * mean) @ basis) @ basis.T
        return Prediction(x_t, t, self.scale * x0, self.process)


def gaussian_run(process: NoiseProcess, folder: Path, **fields: object):  # type: ignore[no-untyped-def]
    law = Gaussian.anisotropic(process, d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    return law, started(Reflow(pairs=200, pair_steps=2, pair_guidance_scale=1.0, **fields), folder, teacher, batch_size=200)


def exact_pairs(law: Gaussian) -> Pairs:
    """Noise and where the law's own trajectory ends, in float64."""
    noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = law.process.at_level(torch.full((200,), LEVELS - 1))
    x0 = law.flow_map(law.process.initial_scale * noise, top, None)
    return Pairs(noise, x0, torch.zeros(200, dtype=torch.long))


@each_process
def test_a_student_on_the_lines_of_an_affine_coupling_has_no_loss_and_one_step_is_exact(
    process: NoiseProcess, tmp_path: Path
) -> None:
    law, running = gaussian_run(process, tmp_path)
    pairs, losses = exact_pairs(law), []
    with running as run:
        run.method._pairs = pairs
        for scale in (1.0, 1.1):
            run._roles.denoiser = lambda name, scale=scale: ExactLines(law, scale)
            losses.append(run.method.loss("first_round", run._micro_batches(0)[0], run._roles)["reflow"].item())
    assert losses[0] < 1e-15 < 1e-3 < losses[1]
    for steps in (1, 2, 7):
        ends = trajectory(ExactLines(law), pairs.noise, None, trailing_times(LEVELS, steps), "ddim")[-1].x0
        assert (ends - pairs.x0).abs().max() < 1e-9


# --- the loss


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_squared_error_of_the_flow_velocity_on_the_line(prediction_type: str, tmp_path: Path) -> None:
    with started(Reflow(**PAIRS), tmp_path, tiny_teacher(prediction_type=prediction_type), batch_size=16) as run:
        shake(run)
        batch, process = run._micro_batches(0)[0], run.teacher.process
        got = run.method.loss("first_round", batch, run._roles)["reflow"]
        z, x0, cond = run.method.draw_pairs(batch)
        s_low, s_high = (r / (1 + r) for r in process.nsr(torch.tensor([0, 999])))
        s = s_high - (s_high - s_low) * batch.draws.uniform("t")
        t = process.t_from_nsr(s / (1 - s))
        a, b = (c(t)[:, None, None, None].float() for c in (process.alpha, process.sigma))
        a_top, b_top = (c(torch.tensor(999)).float() for c in (process.alpha, process.sigma))
        eps = (z - a_top * x0) / b_top
        student = run._roles.denoiser("student")(a * x0 + b * eps, t, cond)
        error = (student.eps - student.x0) - (eps - x0)
    assert got.item() == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert got > 0.1


def test_the_distillation_is_the_distance_of_samples_at_the_student_s_own_times(tmp_path: Path) -> None:
    """One step: ``1 / s_T^2`` times the squared error of the sample; of more steps each of the times is drawn."""
    with started(Reflow(distill=True, round_steps=1, repeat_steps=2, **PAIRS), tmp_path) as run:
        shake(run)
        batch, roles, process = run._micro_batches(1)[0], run._roles, run.teacher.process
        got = run.method.loss("distillation", batch, roles)["reflow"]
        with torch.no_grad():
            previous = roles.denoiser("previous")
            times = torch.tensor([999, 499])
            x0 = ddim_sample(lambda x, t: previous(x, t, batch.cond), batch.noise("noise"), times)
            sample = run.method.sample(roles.denoiser("student"), batch.noise("noise"), batch.cond)
        r = process.nsr(torch.tensor(999))
        assert got.item() == pytest.approx(((1 + r) / r).square().item() * (sample - x0).square().mean().item(), rel=1e-4)
        drawn = Reflow(steps=4)._own_times(run._micro_batches(0)[0], process)
        assert set(drawn.tolist()) <= {999, 749, 499, 249}


# --- how it samples


def stepped(scheduler: Any, denoise: Any, x: Tensor) -> Tensor:
    """The loop of a pipeline, with a closed form for the network; ``denoise(x, time)`` gives what the network would."""
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 4])
def test_the_stock_vp_scheduler_and_the_stock_flow_scheduler_make_the_same_samples(steps: int) -> None:
    """DDIM under the VP table is Euler under the flow, from the state at the flow's scale, at times of equal sigma / alpha."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    process, flow = laws.process(), RectifiedFlow()
    ring = GaussianMixture.ring(process)
    levels = Reflow(steps=steps).levels()
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if steps == 1:
        vp = one_step_scheduler(process.alphas_cumprod[999].item(), timestep=999, prediction_type="epsilon")
        vp.set_timesteps(1)
    else:
        vp = ddim_scheduler(process.alphas_cumprod, levels, "epsilon")
    assert vp.timesteps.tolist() == levels
    by_vp = stepped(vp, lambda x, t: ring(x, t.expand(64)).eps, noise)
    times = flow_time(process, torch.tensor(levels))
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=times.tolist())
    scale = process.alpha(torch.tensor(999)) + process.sigma(torch.tensor(999))
    matched = SNRMatched(ring, flow)
    by_flow = stepped(euler, lambda x, t: flow_velocity(matched(x, (t.double() / 1000).expand(64))), noise / scale)
    assert (by_vp - by_flow).abs().max() < 1e-4
    with torch.no_grad():
        assert (Reflow(steps=steps).sample(LawDenoiser(ring), noise, None) - by_vp).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("teacher", "kind"),
    [(tiny_teacher, "DPMSolverMultistepScheduler"), (tiny_flow_teacher, "FlowMatchEulerDiscreteScheduler")],
    ids=["sd", "sana"],
)
def test_a_student_is_exported_with_the_teacher_s_own_pipeline_and_a_stock_scheduler(teacher: Any, kind: str) -> None:
    given = teacher()
    pipeline, scheduler = Reflow(steps=4).schedule(given).parts(given)
    assert pipeline is type(given.pipeline)
    assert type(scheduler).__name__ == kind


# --- stages


def test_stages_come_in_order_and_each_restarts_and_hands_its_average_on(tmp_path: Path) -> None:
    method = Reflow(rounds=2, distill=True, round_steps=3, repeat_steps=2, lr=1e-3, **PAIRS)
    names = [method.updates(step)[0] for step in range(11)]
    assert names == 3 * ["first_round"] + 3 * ["later_round"] + 5 * ["distillation"]
    assert [round(1e3 * method.lr_of("student", step), 3) for step in (0, 1, 2, 3, 8, 9)] == [1.0, 0.667, 0.333, 1.0, 0.333, 0.0]
    assert {Reflow(lr=1e-3).lr_of("student", step) for step in (0, 400, 5000)} == {1e-3}
    with started(method, tmp_path, warmup_steps=0, ema_decay=0.9) as run:
        first = [p.clone() for p in run._roles.parameters("previous")]
        for _ in range(3):
            run.advance()
        assert all(map(torch.equal, first, run._roles.parameters("previous")))
        averaged, old = [p.clone() for p in run._ema.shadow_params], run._optimizers["student"]
        run.advance()
        assert run._optimizers["student"] is not old
        assert all(map(torch.equal, averaged, run._roles.parameters("previous")))
        for _ in range(2):
            run.advance()
        assert all(map(torch.equal, averaged, run._roles.parameters("previous")))  # frozen within its stage


def test_one_round_keeps_no_second_network() -> None:
    assert Reflow().roles().keys() == {"student"}
    assert Reflow(distill=True).roles().keys() == {"student", "previous"}


def test_a_run_too_short_for_its_stages_is_refused_with_the_number_it_needs(tmp_path: Path) -> None:
    method = Reflow(distill=True, round_steps=5)
    with pytest.raises(UserError, match="max_steps=10"):
        Trainer(method, tiny_teacher(), output_dir=tmp_path, max_steps=9)
    assert Reflow(round_steps=50).check_length(9) is None


def test_iterations_beyond_the_stages_are_said_to_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(Reflow(distill=True, round_steps=2, repeat_steps=2, **PAIRS), tmp_path):
        assert "the stages end after 4 iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields", [{"rounds": 0}, {"round_steps": 0}, {"repeat_steps": 0}, {"steps": 0}, {"steps": 51}, {"lr": 0.0}]
)
def test_settings_without_meaning_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        Reflow(**fields)  # type: ignore[arg-type]


# --- what it is for


def test_paths_are_straighter_and_one_step_is_near_the_law_after_reflow_on_the_ring(tmp_path: Path) -> None:
    """Measured (seed 0): straightness 1.50 and 0.08, one-step distance to the ends of the trajectories 1.81 and 0.43."""
    teacher = laws.teacher("ring")
    method = Reflow(pairs=4000, pair_steps=16, pair_guidance_scale=1.0, lr=2e-3)
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    times = teacher.process.at_level(torch.tensor(trailing_times(LEVELS, 16)))
    with torch.no_grad():
        ends = ddim_sample(lambda x, t: teacher.denoiser(x, t, None), noise, times)
    found = []
    with started(method, tmp_path, teacher, max_steps=250, batch_size=256, ema_decay=0.0, warmup_steps=10) as run:
        for denoiser, steps in ((teacher.denoiser, 0), (run._roles.denoiser("student"), 250)):
            for _ in range(steps):
                run.advance()
            with torch.no_grad():
                curved = straightness(lambda x, t, d=denoiser: d(x, t, None), noise, times).mean().item()
                found.append((curved, (method.sample(denoiser, noise, None) - ends).norm(dim=1).mean().item()))
    (before, far), (after, near) = found
    assert after < 0.1 * before
    assert near < 0.35 * far
