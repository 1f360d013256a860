"""SiD: identities at its optimum and away from it, and a gradient that runs through frozen networks."""

import dataclasses
from pathlib import Path

import pytest
import torch
from short_runs import listening, shake, started
from torch import Tensor

from fastdiff.models.law import LawDenoiser
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import SiD
from fastdiff.trainers.method import Method

VARIANTS: dict[str, Method] = {
    "guided": SiD(null_probability=0.0, alpha=1.2, fake_score_warmup=1),
}
OFF = Setting(shift=0.3, spread=1.2, n=20_000)


def exact(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples x, mu_r and mu_f at the x_t of the method's own draws, and the method's mean loss."""
    method = SiD(guidance_scale=1.0, alpha=1.2)
    _, batch, roles = sample_gradients(method, setting)
    with torch.no_grad():
        t, eps = method.times("student_t", batch), batch.noise("student_eps")
        x = roles.student(batch.noise("z"), t, batch.cond).x0
        x_t = roles.teacher.process.add_noise(x, eps, t)
        real, fake = (LawDenoiser(law)(x_t, t, batch.cond).x0 for law in (roles.teacher.law, roles.fake))  # type: ignore[arg-type]
        return x, real, fake, method.loss("student", batch, roles)["sid"]  # type: ignore[arg-type]


def within(values: Tensor, want: float = 0.0) -> bool:
    """The mean of independent values is within four of its standard errors."""
    return bool((values.mean() - want).abs() < 4 * values.std() / len(values) ** 0.5)


def test_the_optimal_fake_score_is_orthogonal_to_every_function_of_x_t() -> None:
    """Tweedie: E (x - mu_f) . g(x_t) = 0, here for g = mu_r - mu_f and g = mu_r; for the wrong score mu_r it is not."""
    x, real, fake, _ = exact(OFF)
    for g in (real - fake, real):
        assert within(((x - fake) * g).sum(1))
    assert not within(((x - real) * (real - fake)).sum(1))


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_the_mean_loss_is_one_minus_alpha_times_fisher(alpha: float) -> None:
    """Before the normaliser, which knows x and so breaks the identity."""
    x, real, fake, loss = exact(OFF)
    difference = real - fake
    unnormalised = (difference * (real - x - alpha * difference)).mean(1)
    fisher = difference.square().mean(1)
    assert fisher.mean() > 1e-3
    assert within(unnormalised - (1 - alpha) * fisher)
    if alpha == 1.2:
        normalised = unnormalised / (x - real).abs().mean(1)
        assert loss.item() == pytest.approx(normalised.mean().item(), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_equal_functions_give_no_gradient_and_no_loss(scale: float) -> None:
    """Guided alike, they stay one function."""
    gradient, batch, roles = sample_gradients(SiD(guidance_scale=scale), Setting())
    assert gradient.abs().max() < 1e-10
    assert SiD(guidance_scale=scale).loss("student", batch, roles)["sid"].abs() < 1e-12  # type: ignore[arg-type]
    assert sample_gradients(SiD(guidance_scale=scale), OFF)[0].abs().max() > 1e-3


def test_descent_moves_the_samples_towards_the_law() -> None:
    gradient, *_ = sample_gradients(SiD(guidance_scale=1.0), Setting(shift=0.3, n=20_000))
    assert gradient.mean(0) @ torch.full((4,), 0.3, dtype=torch.float64) > 1e-3  # the same amount off in every direction


def test_the_gradient_runs_through_both_networks_and_not_through_the_normaliser() -> None:
    method = SiD(guidance_scale=1.0)
    setting = dataclasses.replace(OFF, n=64)
    gradient, batch, roles = sample_gradients(method, setting)
    t, eps = method.times("student_t", batch), batch.noise("student_eps")
    with torch.no_grad():
        x = roles.student(batch.noise("z"), t, batch.cond).x0
    found = {}
    for frozen in ("neither", "real", "fake"):
        x.requires_grad_()
        x_t = roles.teacher.process.add_noise(x, eps, t)
        real = LawDenoiser(roles.teacher.law)(x_t, t, batch.cond).x0  # type: ignore[arg-type]
        fake = LawDenoiser(roles.fake)(x_t, t, batch.cond).x0
        real, fake = real.detach() if frozen == "real" else real, fake.detach() if frozen == "fake" else fake
        normaliser = (x - real).abs().mean(1, keepdim=True).detach()
        loss = ((real - fake) * (real - x - (real - fake)) / normaliser).mean(1).sum()
        (found[frozen],) = torch.autograd.grad(loss, x)
        x = x.detach()
    assert (gradient - found["neither"]).norm() < 1e-9 * gradient.norm()
    assert (gradient - found["real"]).norm() > 0.1 * gradient.norm()
    assert (gradient - found["fake"]).norm() > 0.1 * gradient.norm()


def test_the_student_update_counts_the_way_back_through_frozen_networks(tmp_path: Path) -> None:
    """And a network that is differentiated in its input keeps its weights without gradient."""
    with started(SiD(null_probability=0.0), tmp_path) as run:
        shake(run)
        run._backward("student", run._micro_batches(0), ("student",))
        assert run._roles.backwards == {"student": 4, "teacher": 8, "fake_score": 8}  # guided: two rows a sample
        assert all(p.grad is None for p in run._roles.parameters("fake_score"))
        assert all(p.grad is None for p in run.teacher.family.backbone.parameters())


def test_the_fake_score_learns_the_null_prompt_only_where_it_is_guided(tmp_path: Path) -> None:
    for scale, learns in ((1.0, False), (1.5, True)):
        with started(SiD(guidance_scale=scale, null_probability=1.0), tmp_path / str(scale)) as run:
            batch = run._micro_batches(0)[0]
            batch.memo["x"] = batch.noise("z")
            with listening(run) as calls:
                run.method.loss("fake_score", batch, run._roles)
            assert torch.equal(calls[0].cond, batch.null if learns else batch.cond)


def test_the_fake_score_learns_x0_with_the_weight_of_edm(tmp_path: Path) -> None:
    with started(SiD(guidance_scale=1.0), tmp_path) as run:
        batch = run._micro_batches(0)[0]
        x = batch.memo["x"] = batch.noise("z")
        got = run.method.loss("fake_score", batch, run._roles)["fake_score"]
        process = run.teacher.process
        t, eps = batch.times("fake_t", 0, 800), batch.noise("fake_eps")
        mu = run._roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.cond).x0
        weight = (process.snr(t) + 1).float()[:, None, None, None]
        want = (weight * (mu - x).square()).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
