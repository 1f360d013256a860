"""Progressive distillation: the target of two steps in one, the rounds, and who teaches in which."""

from pathlib import Path

import pytest
import torch
from short_runs import shake, started
from tiny import tiny_teacher
from torch import Tensor

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow
from fastdiff.diffusion.solvers import ddim_step, ddim_target
from fastdiff.errors import UserError
from fastdiff.models.law import LawDenoiser
from fastdiff.models.roles import Roles
from fastdiff.proof.laws import process as stable_diffusion
from fastdiff.trainers import ProgressiveDistillation
from fastdiff.trainers.method import Method

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "two-rounds": ProgressiveDistillation(start_steps=4, steps=1, round_steps=1, guidance_scale=2.0, **PAIRS),
    "snr+1": ProgressiveDistillation(start_steps=8, steps=4, round_steps=4, guidance_scale=1.0, weighting="snr+1", **PAIRS),
}


@pytest.mark.parametrize("process", [stable_diffusion(), EDM(), RectifiedFlow()], ids=["vp", "edm", "flow"])
def test_one_step_to_the_target_ends_where_the_two_steps_did(process: NoiseProcess) -> None:
    law = Gaussian.anisotropic(process)
    generator = torch.Generator().manual_seed(0)
    t, middle, end = (process.at_level(torch.full((8,), level)) for level in (800, 600, 400))
    x_t = process.add_noise(law.sample(8, generator), torch.randn(8, 16, generator=generator, dtype=torch.float64), t)
    first = law(x_t, t)
    x_end = ddim_step(law(ddim_step(first, middle), middle), end)
    target = ddim_target(x_t, t, x_end, end, process)
    again = first.__class__(x_t, t, target, process)
    assert torch.allclose(ddim_step(again, end), x_end, rtol=0, atol=1e-10 * x_end.abs().max().item())
    same = ddim_step(first.__class__(x_t, t, first.x0, process), end)  # half steps of one x0 are one step of it
    assert torch.allclose(ddim_target(x_t, t, same, end, process), first.x0, rtol=1e-7, atol=1e-9)


class Constant(LawDenoiser):
    """Says the same x0 whatever it sees: two of its steps are one."""

    def __init__(self, x0: Tensor, process: NoiseProcess) -> None:
        self.x0, self.process = x0, process

    def __call__(self, x_t: Tensor, t: Tensor, cond: object):  # type: ignore[no-untyped-def]
        from fastdiff.diffusion.prediction import Prediction

        return Prediction(x_t, t, self.x0.expand_as(x_t), self.process)


@pytest.mark.parametrize("step", [0, 3])
def test_a_student_with_the_x0_of_straight_lines_has_no_loss(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(ProgressiveDistillation(start_steps=4, steps=1, round_steps=3, **PAIRS), tmp_path) as run:
        constant = Constant(torch.randn(1, *run.teacher.latent_shape), run.teacher.process)
        monkeypatch.setattr(Roles, "denoiser", lambda self, name: constant)
        monkeypatch.setattr(Constant, "guided", lambda self, x_t, t, cond, null, scale: self(x_t, t, cond), raising=False)
        (batch,) = run._micro_batches(step)
        (update,) = run.method.updates(step)
        assert run.method.loss(update, batch, run._roles)["progressive"] < 1e-9


def test_the_last_step_ends_at_the_second_x0_of_the_teacher(tmp_path: Path) -> None:
    """One step of one: t is the last level for all samples, and the target what two DDIM steps of the teacher make of x_T."""
    method = ProgressiveDistillation(start_steps=2, steps=1, round_steps=5, guidance_scale=1.0, **PAIRS)
    with started(method, tmp_path) as run:
        shake(run)
        (batch,) = run._micro_batches(0)
        _, x0, cond = method.draw_pairs(batch)
        process, denoiser = run.teacher.process, run.teacher.denoiser
        t, middle = (process.at_level(torch.full((len(x0),), level)) for level in (999, 499))
        x_t = process.add_noise(x0, batch.noise("eps"), t)
        with torch.no_grad():
            target = denoiser(ddim_step(denoiser(x_t, t, cond), middle), middle, cond).x0
            student = run._roles.denoiser("student")(x_t, t, cond).x0
        loss = method.loss("first_round", batch, run._roles)["progressive"]
        assert loss.item() == pytest.approx((student - target).square().mean().item(), rel=1e-5)  # SNR is below 1 there


def test_a_round_hands_its_average_on_and_starts_anew(tmp_path: Path) -> None:
    method = ProgressiveDistillation(start_steps=8, steps=1, round_steps=3, lr=1e-3, **PAIRS)
    assert [method.updates(step)[0] for step in range(8)] == 3 * ["first_round"] + 5 * ["later_round"]
    assert [method.round(step) for step in (0, 2, 3, 5, 6, 30)] == [0, 0, 1, 1, 2, 2]
    assert [round(1e3 * method.lr_of("student", step), 3) for step in range(5)] == [1.0, 0.667, 0.333, 1.0, 0.667]
    with started(method, tmp_path, warmup_steps=0, ema_decay=0.9) as run:
        for _ in range(3):
            run.advance()
        averaged = [p.clone() for p in run._ema.shadow_params]
        assert not torch.equal(averaged[0], run._roles.parameters("student")[0])
        old = run._optimizers["student"]
        run.advance()
        assert run._optimizers["student"] is not old
        for mean, handed in zip(averaged, run._roles.parameters("previous"), strict=True):
            assert torch.equal(mean, handed)
        states = run._optimizers["student"].optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {1}


@pytest.mark.parametrize(
    "fields", [{"start_steps": 12, "steps": 4}, {"start_steps": 4, "steps": 4}, {"start_steps": 4, "steps": 0}, {"round_steps": 0}]
)
def test_steps_that_do_not_halve_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"start_steps|round_steps"):
        ProgressiveDistillation(**fields)


def test_a_run_too_short_for_its_rounds_is_refused_with_the_number_it_needs(tmp_path: Path) -> None:
    from fastdiff import Trainer

    method = ProgressiveDistillation(start_steps=4, steps=1, round_steps=5)
    with pytest.raises(UserError, match="max_steps=10"):
        Trainer(method, tiny_teacher(), output_dir=tmp_path, max_steps=9)
    assert Trainer(method, tiny_teacher(), output_dir=tmp_path, max_steps=10).method is method


def test_iterations_beyond_the_rounds_are_said_to_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = ProgressiveDistillation(start_steps=4, steps=1, round_steps=2, **PAIRS)
    assert [method.lr_of("student", step) for step in (4, 5, 60)] == [0.0, 0.0, 0.0]
    with started(method, tmp_path):
        assert "the rounds end after 4 iterations" in capsys.readouterr().out
