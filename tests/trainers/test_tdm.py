"""TDM: where its times lie, what it diffuses, its weight and its gradient."""

from pathlib import Path

import pytest
import torch
from short_runs import shake, started, trainer
from torch import Tensor, nn

from fastdiff.diffusion.process import EDM, RectifiedFlow, TrigFlow
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import TDM
from fastdiff.trainers.method import Batch, Method
from fastdiff.trainers.rollout import Moments
from fastdiff.trainers.tdm import _end_of_step

VARIANTS: dict[str, Method] = {
    "4-steps": TDM(),
    "lora-squared-two-counts": TDM(
        step_counts=(1, 2), start=1000, train="lora", rank=4, fake_updates=2, distance="squared", guidance_scale=2.0
    ),
}


def parts(method: TDM, tmp_path: Path, **options: object) -> tuple[Moments, Batch, tuple[Tensor, Tensor, Tensor]]:
    with started(method, tmp_path, **options) as run:
        shake(run)
        batch = run._micro_batches(0)[0]
        pool = method._pools[max(method.step_counts)]
        moments = pool.student_inputs(batch, run._roles, 0)
        return moments, batch, method._diffuse(moments, pool.levels, "student", batch)


def test_tau_lies_in_the_step_of_its_sample_and_the_steps_do_not_overlap(tmp_path: Path) -> None:
    method = TDM(start=900)
    moments, _, (_, tau, _) = parts(method, tmp_path, batch_size=64)
    assert set(moments.rung.tolist()) == {0, 1, 2, 3}
    for rung, (low, high) in enumerate([(674, 889), (449, 664), (224, 439), (20, 214)]):
        own = tau[moments.rung == rung]
        assert ((own >= low) & (own < high)).all()
    assert method.levels() == [899, 674, 449, 224]


def test_x_tau_is_x0_with_the_mixed_noise_and_the_weight_is_of_that_noise(tmp_path: Path) -> None:
    """x_tau = a_tau x0 + s_tau mixed, for every rung; mixed is unit noise where the student's eps is."""
    moments, batch, (x_tau, tau, importance) = parts(TDM(start=1000), tmp_path, batch_size=32)
    process, e = batch.teacher.process, batch.noise("student_eps")
    a, s = (c(tau)[:, None, None, None] for c in (process.alpha, process.sigma))
    mixed = (x_tau - a * moments.x0) / s
    expected = ((e.square().flatten(1).mean(1) - mixed.square().flatten(1).mean(1)) / 2).exp()
    assert torch.allclose(importance.double(), expected.double(), rtol=2e-3)
    assert (importance - 1).abs().max() > 1e-3


def test_at_the_end_of_its_step_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tau = m: beta = 0 and x_tau is the state after the step."""
    monkeypatch.setattr(Batch, "times", lambda self, name, low, high: self.teacher.process.at_level(low))
    moments, _, (x_tau, _, _) = parts(TDM(start=1000), tmp_path, batch_size=32)
    inner = moments.rung < 3
    assert torch.allclose(x_tau[inner], moments.after[inner], atol=1e-4)
    assert not torch.allclose(x_tau[~inner], moments.after[~inner], atol=1e-2)  # the last step ends at x0, below level 20


def test_the_end_of_the_last_step_has_no_noise() -> None:
    from fastdiff.proof.laws import process

    a, s = _end_of_step(process(), torch.tensor([499, 0]), torch.tensor([False, True]))
    assert a[0] == process().alpha(torch.tensor(499))
    assert (a[1], s[1]) == (1, 0)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_one_step_has_the_gradient_of_dmd_with_a_guided_teacher(guidance_scale: float, tmp_path: Path) -> None:
    """Squared: 2 (x0_fake - x0_real) / mean|x - x0_real| over the number of elements, at a fresh diffusion of x0 itself."""
    method = TDM(step_counts=(1,), start=1000, distance="squared", guidance_scale=guidance_scale)
    with started(method, tmp_path) as run:
        shake(run)
        batch, roles = run._micro_batches(0)[0], run._roles
        run._backward("student", [batch], ("student",))
        got = torch.cat([p.grad.flatten() for p in roles.parameters("student") if p.grad is not None])
        for p in roles.parameters("student"):
            p.grad = None
        moments = method._pools[1].student_inputs(batch, roles, 0)
        cond, t = batch.prompts.conditions(moments.prompt), torch.full((4,), 999)
        x = roles.denoiser("student")(moments.x_t, t, cond).x0
        tau = batch.times("student_tau", torch.full((4,), 20), torch.full((4,), 988))
        with torch.no_grad():
            x_tau = run.teacher.process.add_noise(x, batch.noise("student_eps"), tau)
            teacher = roles.denoiser("teacher")
            c, u = teacher(x_tau, tau, cond).x0, teacher(x_tau, tau, batch.null).x0
            real, fake = u + guidance_scale * (c - u), roles.denoiser("fake_score")(x_tau, tau, cond).x0
            gradient = 2 * (fake - real) / (x - real).abs().flatten(1).mean(1)[:, None, None, None]
        (gradient * x).sum().div(x.numel()).backward()
        want = torch.cat([p.grad.flatten() for p in roles.parameters("student") if p.grad is not None])
    assert want.norm() > 0
    assert (got - want).norm() < 1e-4 * want.norm()


def test_the_number_of_steps_is_drawn_for_each_cycle_and_kept_within_it(tmp_path: Path) -> None:
    method = TDM(step_counts=(1, 2, 4), start=1000, fake_updates=3)
    with started(method, tmp_path, max_steps=99) as run:
        drawn = []
        for step in range(0, 90, 3):
            pools = {id(method._pool(run._micro_batches(i)[0], step)) for i in range(step, step + 3)}
            assert len(pools) == 1
            drawn.append(len(method._pool(run._micro_batches(step)[0], step).levels))
    assert set(drawn) == {1, 2, 4}
    assert method.levels() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    "fields",
    [
        {"step_counts": ()},
        {"step_counts": (7,)},
        {"step_counts": (2, 2)},
        {"start": 1200},
        {"start": 900, "step_counts": (36,)},
        {"fake_updates": 0},
        {"train": "x"},
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        TDM(**fields)  # type: ignore[arg-type]


class Pointwise(nn.Module):
    """Looks at each element alone, so that how the elements are laid out cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.time = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        late = (self.time * t.to(x_t) / 1000 + 0.1 * labels.to(x_t)).reshape(-1, *[1] * (x_t.ndim - 1))
        return self.scale * x_t.tanh() + late


def test_latents_with_a_time_axis_have_the_losses_of_the_same_elements_without_one(tmp_path: Path) -> None:
    """Video: normaliser, importance weight and means are over all elements of a sample, frames included."""
    found = []
    for name, shape in (("video", (2, 3, 4, 4)), ("image", (2, 12, 4))):
        teacher = Teacher.from_module(Pointwise(), RectifiedFlow(), "flow_prediction", shape=shape, prompts=["0", "1"])
        with started(TDM(start=1000), tmp_path / name, teacher) as run:
            shake(run)
            batch = run._micro_batches(0)[0]
            found.append([run.method.loss(update, batch, run._roles) for update in ("rollout", "fake_score", "student")])
    for video, image in zip(*found, strict=True):
        assert video.keys() == image.keys()
        for key in video:
            assert video[key].item() == pytest.approx(image[key].item(), rel=1e-5)
            assert video[key].item() > 0


def test_a_first_call_below_the_last_level_is_refused_where_the_noise_grows(tmp_path: Path) -> None:
    """Samplers start from the last level's noise; at level 899 of EDM that is 1.8 times what the network expects."""
    for process in (EDM(), RectifiedFlow(), TrigFlow()):
        teacher = Teacher.from_module(TimeMLP(2), process, "sample", shape=(2,), name="mine")
        with pytest.raises(UserError, match="start=1000"):
            trainer(TDM(start=900, step_counts=(2,)), tmp_path, teacher)
        trainer(TDM(start=1000, step_counts=(2,)), tmp_path, teacher)
