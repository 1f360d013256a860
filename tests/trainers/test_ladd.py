"""LADD: who gets gradient through the teacher, what the heads see, both games at zero, the penalties, and the student's times."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import shake, started
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor, nn

from fastdiff import Trainer
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import LADD
from fastdiff.trainers._adversarial import Heads, log_normal_times
from fastdiff.trainers.method import Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "softplus": LADD(**_FEW, r1_weight=0.1),
    "hinge": LADD(**_FEW, gan="hinge", r1="input", r1_weight=10.0, taps=(0.5, 1.0), steps=2),
}


@pytest.fixture(params=[tiny_teacher, tiny_flow_teacher], ids=["unet", "sana"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    with started(LADD(**_FEW), tmp_path, request.param()) as run:
        shake(run)
        yield run


def grads(run: Trainer, name: str) -> list[Tensor | None]:
    return [p.grad for p in run._roles.parameters(name)]


# --- who gets gradient


def test_the_student_gets_its_gradient_through_a_teacher_that_gets_none(run: Trainer) -> None:
    (batch,) = run._micro_batches(0)
    run._roles.train_only("student")
    run.method.loss("student", batch, run._roles)["gan"].backward()
    assert all(g is not None and torch.isfinite(g).all() for g in grads(run, "student"))
    assert any(g.abs().max() > 0 for g in grads(run, "student") if g is not None)
    assert all(g is None for g in grads(run, "discriminator"))
    assert all(p.grad is None for p in run.teacher.family.backbone.parameters())


def test_the_heads_learn_and_neither_student_nor_teacher_does(run: Trainer) -> None:
    (batch,) = run._micro_batches(0)
    run.method.loss("student", batch, run._roles)
    run._roles.train_only("discriminator")
    run.method.loss("discriminator", batch, run._roles)["discriminator"].backward()
    assert all(g is not None for g in grads(run, "discriminator"))
    assert all(g is None for g in grads(run, "student"))
    assert all(p.grad is None for p in run.teacher.family.backbone.parameters())


def test_every_head_pulls_at_the_samples(run: Trainer) -> None:
    """Of each tapped block alone there is a gradient; features under no_grad would have none, and the loss would look well."""
    (batch,) = run._micro_batches(0)
    x = torch.randn(4, *run.teacher.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (maps,) = run.method.maps(x, "fool", batch.cond, batch, run._roles)  # type: ignore[attr-defined]
    assert len(maps) == len(run.teacher.family.blocks(run.teacher.family.backbone)) > 2
    for features in maps:
        (gradient,) = torch.autograd.grad(features.square().sum(), x, retain_graph=True)
        assert gradient.flatten(1).abs().amax(1).min() > 0


# --- the game


@pytest.mark.parametrize(("gan", "value", "slope"), [("softplus", 2 * math.log(2), math.log(2)), ("hinge", 2.0, 0.0)])
def test_heads_that_say_nothing_have_the_loss_of_a_guess(gan: Any, value: float, slope: float, tmp_path: Path) -> None:
    with started(LADD(**_FEW, gan=gan), tmp_path) as run:
        for head in run._roles.modules["discriminator"].heads:
            nn.init.zeros_(head.logit.weight)
            nn.init.zeros_(head.logit.bias)
        (batch,) = run._micro_batches(0)
        assert run.method.loss("student", batch, run._roles)["gan"].item() == pytest.approx(slope, abs=1e-6)
        assert run.method.loss("discriminator", batch, run._roles)["discriminator"].item() == pytest.approx(value, rel=1e-6)


def test_taps_are_shares_of_the_depth(tmp_path: Path) -> None:
    teacher = tiny_flow_teacher()  # four blocks
    assert LADD().tapped(teacher) == [0, 1, 2, 3]
    assert LADD(taps=(1.0, 0.34)).tapped(teacher) == [1, 3]
    ran: list[nn.Module] = []
    with started(LADD(**_FEW, taps=(0.34, 0.67)), tmp_path, teacher) as run:
        for block in teacher.family.blocks(teacher.family.backbone):
            block.register_forward_hook(lambda module, *_: ran.append(module))
        (batch,) = run._micro_batches(0)
        run.method.maps(batch.noise("x"), "fool", batch.cond, batch, run._roles)  # type: ignore[attr-defined]
    assert ran == teacher.family.blocks(teacher.family.backbone)[:3]


class Square(nn.Module):
    """A head whose slope is known: ``|f|^2 / 2``, so that R1 at f is ``|f|^2``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * features.flatten(1).square().sum(1) / 2


def test_the_penalty_at_the_features_is_the_squared_slope_of_the_head(tmp_path: Path) -> None:
    with started(LADD(**_FEW, r1_weight=0.5, taps=(1.0,)), tmp_path) as run:
        run._roles.modules["discriminator"] = Heads([Square()])
        (batch,) = run._micro_batches(0)
        run.method.loss("student", batch, run._roles)
        r1 = run.method.loss("discriminator", batch, run._roles)["r1"]
        _, real, cond = run.method.draw_pairs(batch, own=True)  # type: ignore[attr-defined]
        with torch.no_grad():
            ((features,),) = run.method.maps(real, "real", cond, batch, run._roles)  # type: ignore[attr-defined]
        assert r1.item() == pytest.approx(0.5 * features.flatten(1).square().sum(1).mean().item(), rel=1e-5)
        r1.backward()  # its own derivative in the scale is 2
        scale = run._roles.modules["discriminator"].heads[0].scale
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx(2 * r1.item(), rel=1e-5)


def test_the_penalty_at_the_input_compares_a_noised_sample_with_itself_nudged(tmp_path: Path) -> None:
    with started(LADD(**_FEW, r1="input", r1_weight=1.0), tmp_path) as run:
        (batch,) = run._micro_batches(0)
        run.method.loss("student", batch, run._roles)
        assert run.method.loss("discriminator", batch, run._roles)["r1"].item() > 0
        batch.noise = lambda name: torch.zeros(4, *run.teacher.latent_shape)  # type: ignore[method-assign]
        assert run.method.loss("discriminator", batch, run._roles)["r1"].item() == 0


# --- times


def test_the_discriminator_s_times_are_logit_normal_under_rectified_flow() -> None:
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    t = log_normal_times(RectifiedFlow(), z, 1.0, 0.8)
    assert (t - torch.sigmoid(1.0 + 0.8 * z.double())).abs().max() < 1e-12
    rows = log_normal_times(laws.process(), z, 1.0, 0.8)
    assert rows.dtype == torch.int64
    assert 0 <= rows.min() <= rows.max() <= 999


def test_the_student_starts_from_noise_alone_at_its_first_time_and_from_results_at_the_others(tmp_path: Path) -> None:
    with started(LADD(**_FEW, steps=4), tmp_path, batch_size=64) as run:
        seen: list[tuple[Tensor, Tensor]] = []
        run._roles.modules["student"].register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1])))
        (batch,) = run._micro_batches(0)
        run.method.generate(batch, run._roles)  # type: ignore[attr-defined]
        _, x0, _ = run.method.draw_pairs(batch, own=True)  # type: ignore[attr-defined]
    (x_t, t), z = seen[0], batch.noise("z")
    assert set(t.tolist()) == {999, 749, 499, 249}
    first = t == 999
    assert torch.equal(x_t[first], z[first])
    want = run.teacher.process.add_noise(x0, z, t)
    assert torch.equal(x_t[~first], want[~first])


# --- settings


@pytest.mark.parametrize(
    "fields", [{"gan": "lsgan"}, {"r1": "x"}, {"r1_weight": -1.0}, {"taps": (2.0,)}, {"steps": 0}, {"gan_log_std": 0.0}]
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        LADD(**fields)


def test_a_network_without_a_place_to_look_at_is_refused(tmp_path: Path) -> None:
    teacher = Teacher.from_module(nn.Linear(2, 2), RectifiedFlow(), "flow_prediction", shape=(2,), name="line")
    with pytest.raises(UserError, match=r"line: .*no bottleneck"):
        Trainer(LADD(), teacher, output_dir=tmp_path)
