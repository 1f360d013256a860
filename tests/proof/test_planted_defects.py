"""The proofs must be able to fail: each known defect is planted, and its certificate or its exactness check must catch it.

Those that only a trained student shows run one short trial, which the sound method passes.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastdiff.trainers.dmd2 as dmd2_module
import fastdiff.trainers.tdm as tdm_module
from fastdiff.losses import denoising, distribution_matching_gradient, pseudo_target, reduce
from fastdiff.models.roles import Roles
from fastdiff.proof.certify import certify_instance
from fastdiff.proof.exactness import ExactRoles, Setting, _Generator, sample_gradients
from fastdiff.trainers import DMD2, TDM, SwiftBrush
from fastdiff.trainers.method import Batch, Trial

SOUND = {"guidance_scale": 1.0, "lr": 1e-3, "fake_score_lr": 2e-3, "ratio": (1, 2)}
SHORT = {"ring": "sliced_w2", "gaussian": "covariance"}
BOUNDS = {"ring": 0.4, "gaussian": 0.8}
OFF = Setting(shift=0.3, spread=1.2)


def short_trial(method: DMD2, law: str) -> float:
    """The law's metric after 500 iterations, a few seconds."""
    trial = Trial(fields={}, bounds={SHORT[law]: BOUNDS[law]}, max_steps=500, batch_size=256, ema_decay=0.95)
    (row,) = certify_instance(method, law, trial)
    assert row.baseline > BOUNDS[law]
    return row.value


@dataclass(kw_only=True)
class FrozenFakeScore(DMD2):
    """The fake score keeps the teacher's weights: the difference of the scores is its approximation error, and no signal."""

    def lr_of(self, role: str, step: int) -> float:
        return 0.0 if role == "fake_score" else super().lr_of(role, step)


@dataclass(kw_only=True)
class ReusedNoise(DMD2):
    """The fake score learns to predict the very noise its sample was made of, as if the two were independent."""

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = batch.memo.get("x"), roles.teacher.process
        if x is None:
            with torch.no_grad():
                x = batch.memo["x"] = dmd2_module.one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        t, eps = batch.times("fake_t", 0, int(process.t_max)), batch.noise("z")
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.cond)
        return {"fake_score": reduce(denoising(fake.eps, eps))}


@pytest.mark.parametrize("law", SHORT)
def test_the_sound_method_passes_the_short_trials(law: str) -> None:
    assert short_trial(DMD2(**SOUND), law) < BOUNDS[law]


@pytest.mark.parametrize(("defect", "law"), [(FrozenFakeScore, "ring"), (ReusedNoise, "gaussian")])
def test_a_defect_of_the_fake_score_fails_its_trial(defect: type[DMD2], law: str) -> None:
    """On the ring the reused noise would pass: modes far apart hide a wrong covariance."""
    assert not short_trial(defect(**SOUND), law) < BOUNDS[law]


def batch_wide(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    return (x0_fake - x0_real) / (x - x0_real).abs().mean()


def sound_gradient(setting: Setting = OFF) -> Tensor:
    return sample_gradients(DMD2(guidance_scale=2.0), setting)[0]


def test_a_normaliser_of_the_whole_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample's gradient must not depend on who else is in the batch."""
    sound = sound_gradient()
    monkeypatch.setattr(dmd2_module, "distribution_matching_gradient", batch_wide)
    assert (sound_gradient() - sound).norm() > 0.1 * sound.norm()


def test_scores_on_the_wrong_side_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = distribution_matching_gradient
    sound = sound_gradient()
    monkeypatch.setattr(dmd2_module, "distribution_matching_gradient", lambda x, real, fake: swapped(x, fake, real))
    assert (sound_gradient() * sound).sum() < 0


@dataclass(kw_only=True)
class GuidedFake(DMD2):
    """Guidance on the fake score and none on the teacher."""

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x = dmd2_module.one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        t, eps = batch.times("student_t", 20, 980), batch.noise("student_eps")
        with torch.no_grad():
            x_t = roles.teacher.process.add_noise(x, eps, t)
            real = roles.denoiser("teacher")(x_t, t, batch.cond)
            fake = roles.denoiser("fake_score").guided(x_t, t, batch.cond, batch.null, self.guidance_scale)
            gradient = distribution_matching_gradient(x, real.x0, fake.x0)
        return {"dmd": reduce(pseudo_target(x, gradient))}


def test_guidance_on_the_wrong_network_is_caught() -> None:
    sound, guided_fake = sound_gradient(), sample_gradients(GuidedFake(guidance_scale=2.0), OFF)[0]
    assert (guided_fake - sound).norm() > 0.1 * sound.norm()


def test_a_detached_student_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    one_step = dmd2_module.one_step

    def detached(*inputs: object) -> Tensor:
        return one_step(*inputs).detach()

    assert sound_gradient().norm() > 0.1
    monkeypatch.setattr(dmd2_module, "one_step", detached)
    assert sound_gradient().norm() == 0


def test_an_unguided_fake_score_of_swiftbrush_is_caught() -> None:
    """SwiftBrush guides both networks: at the optimum nothing is left to do, at any scale."""
    at_optimum, *_ = sample_gradients(SwiftBrush(guidance_scale=4.5), Setting())
    assert at_optimum.abs().max() < 1e-10
    assert sample_gradients(DMD2(guidance_scale=4.5), Setting())[0].abs().max() > 0.1


def tdm_fake_score_loss() -> tuple[float, float]:
    """TDM's fake-score loss on a known generator, and the sheet's formula for it, written out."""
    method = TDM(step_counts=(4,), start=1000)
    real, fake, biases, factor = OFF.laws()
    batch = OFF.batch(real)
    roles = ExactRoles(batch.teacher, _Generator(biases, factor, torch.zeros(1, OFF.d), real.process), fake)
    (got,) = method.loss("fake_score", batch, roles).values()  # type: ignore[arg-type]
    moments, process = method._pools[4].fake_score_samples(batch, roles, 0, 0), real.process  # type: ignore[arg-type]
    t = torch.tensor([999, 749, 499, 249])[moments.rung]
    m, last = torch.tensor([749, 499, 249, 0])[moments.rung], (moments.rung == 3)[:, None]
    tau = batch.times("fake_tau", m.clamp(min=20), t - 11)
    a_t, s_t, a_m, s_m, a, s = (c(time)[:, None] for time in (t, m, tau) for c in (process.alpha, process.sigma))
    a_m, s_m, e = a_m.where(~last, 1.0), s_m.where(~last, 0.0), batch.noise("fake_eps")
    eps = (moments.x_t - a_t * moments.x0) / s_t
    beta = (s.square() - (a / a_m * s_m).square()).sqrt()
    x_tau = a / a_m * (a_m * moments.x0 + s_m * eps) + beta * e
    mixed = (a / a_m * s_m * eps + beta * e) / s
    weight = (-mixed.square().mean(1) / 2).exp() / (-e.square().mean(1) / 2).exp() * (a / s).square().clamp(max=5)[:, 0]
    error = fake(x_tau, tau, batch.prompts.conditions(moments.prompt)).x0 - moments.x0
    return got.item(), (weight[:, None] * error.square()).mean().item()


def test_a_missing_importance_weight_of_tdm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    got, want = tdm_fake_score_loss()
    assert got == pytest.approx(want, rel=1e-6)
    monkeypatch.setattr(tdm_module, "trajectory_importance", lambda mixed, fresh: torch.ones(len(mixed)))
    assert abs(tdm_fake_score_loss()[0] - want) > 0.01 * want
