"""The proofs must be able to fail: each known defect is planted, and its certificate or its exactness check must catch it.

Those that only a trained student shows run one short trial, which the sound method passes.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastdiff.trainers.dmd2 as dmd2_module
from fastdiff.losses import denoising, distribution_matching_gradient, pseudo_target, reduce
from fastdiff.models.roles import Roles
from fastdiff.proof.certify import certify_instance
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import DMD2, SwiftBrush
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
