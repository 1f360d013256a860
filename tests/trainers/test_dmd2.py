"""DMD2: what its losses are, term by term."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher

from fastdiff import Trainer
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import EDM
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.roles import Start
from fastdiff.models.smaller import smaller
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import DMD2
from fastdiff.trainers.method import Method, due, one_step

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "full": DMD2(ratio=(1, 3), fake_score_warmup=1),
    "full-gan": DMD2(ratio=(1, 3), gan_weight=1e-3, **PAIRS),
    "lora-warm": DMD2(ratio=(2, 3), fake_score="lora", rank=4, warm_start_steps=2, **PAIRS),
    "pull": DMD2(ratio=(1, 2), pull=0.1),
    "4-steps": DMD2(steps=4, ratio=(1, 5)),
    "2-steps-lora-gan-r1-warm": DMD2(
        steps=2, ratio=(1, 2), fake_score="lora", rank=4, gan_weight=1e-3, r1_weight=10.0, warm_start_steps=1, **PAIRS
    ),
}


def started(tmp_path: Path, **fields: object) -> Trainer:
    run = Trainer(DMD2(**fields), tiny_teacher(), output_dir=tmp_path, max_steps=9, batch_size=4)
    run.start()
    return run


def shake(run: Trainer, role: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in run._roles.parameters(role):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("fake_score", ["full", "lora"])
def test_equal_scores_give_the_student_zero_gradient(fake_score: str, tmp_path: Path) -> None:
    run = started(tmp_path, guidance_scale=1.0, fake_score=fake_score)  # both start from the teacher
    run._backward("student", run._micro_batches(0), ("student",))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in run._roles.parameters("student"))
    run.close()


def test_student_gradient_is_the_formula_and_only_the_teacher_is_guided(tmp_path: Path) -> None:
    run = started(tmp_path, guidance_scale=2.0)
    shake(run, "fake_score")
    batch = run._micro_batches(0)[0]
    run._backward("student", [batch], ("student",))
    got = torch.cat([p.grad.flatten() for p in run._roles.parameters("student") if p.grad is not None])
    for p in run._roles.parameters("student"):
        p.grad = None
    roles = run._roles
    x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
    t, eps = batch.times("student_t", 20, 980), batch.noise("student_eps")
    with torch.no_grad():
        x_t = run.teacher.process.add_noise(x, eps, t)
        teacher = roles.denoiser("teacher")
        cond, null = teacher(x_t, t, batch.cond).x0, teacher(x_t, t, batch.null).x0
        real, fake = null + 2.0 * (cond - null), roles.denoiser("fake_score")(x_t, t, batch.cond).x0
        normaliser = torch.stack([(a - b).abs().mean() for a, b in zip(x, real, strict=True)])
        gradient = (fake - real) / normaliser[:, None, None, None]
    (gradient * x).sum().div(x.numel()).backward()
    want = torch.cat([p.grad.flatten() for p in roles.parameters("student") if p.grad is not None])
    run.close()
    assert want.norm() > 0
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("ratio", [(1, 5), (1, 1), (2, 3), (3, 7)])
def test_the_ratio_counts_student_and_fake_score_updates(ratio: tuple[int, int]) -> None:
    method = DMD2(ratio=ratio)
    made = [update for step in range(10 * ratio[1]) for update in method.updates(step)]
    assert made.count("student") == 10 * ratio[0]
    assert made.count("fake_score") == 10 * ratio[1]
    assert due(0, ratio)


def test_bad_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="full or lora"):
        DMD2(fake_score="adapter")
    with pytest.raises(ValueError, match="ratio"):
        DMD2(ratio=(5, 1))


def test_gan_off_has_no_discriminator_and_no_pairs(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert set(run._optimizers) == {"student", "fake_score"}
    assert not list(tmp_path.glob("pairs*"))
    assert set(run.method.loss("student", run._micro_batches(0)[0], run._roles)) == {"dmd"}
    run.close()


def test_gan_reaches_student_through_the_frozen_fake_score_and_back(tmp_path: Path) -> None:
    run = started(tmp_path, guidance_scale=1.0, gan_weight=1e-3, **PAIRS)
    batch = run._micro_batches(0)[0]
    run._backward("student", [batch], ("student",))  # the DMD term is zero here: what arrives is the GAN's
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in run._roles.parameters("student"))
    assert all(p.grad is None for n in ("fake_score", "discriminator") for p in run._roles.parameters(n))
    for p in run._roles.parameters("student"):
        p.grad = None
    run._roles.train_only("fake_score", "discriminator")
    run.method.loss("fake_score", batch, run._roles)["discriminator"].backward()
    encoder = dict(run._roles.modules["fake_score"].named_parameters())
    assert encoder["conv_in.weight"].grad.abs().max() > 0
    assert encoder["conv_out.weight"].grad is None  # the decoder half did not run
    assert all(p.grad is not None for p in run._roles.parameters("discriminator"))
    assert all(p.grad is None for p in run._roles.parameters("student"))
    run.close()


def test_a_gan_term_without_a_bottleneck_is_refused_before_the_training(tmp_path: Path) -> None:
    law = GaussianMixture.ring(laws.process())
    teacher = Teacher.from_module(TimeMLP(2), law.process, "v_prediction", shape=(2,), law=law, name="ring")
    with pytest.raises(UserError, match=r"ring.*no bottleneck.*GAN term off"):
        Trainer(DMD2(gan_weight=1e-3), teacher, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Trainer(DMD2(), teacher, output_dir=tmp_path / "run")


def test_an_iteration_without_student_update_builds_no_student_graph(tmp_path: Path) -> None:
    run = started(tmp_path)
    batch = run._micro_batches(1)[0]
    run._roles.train_only("fake_score")
    run.method.loss("fake_score", batch, run._roles)
    assert not batch.memo["x"].requires_grad
    run.close()


def test_a_fake_score_is_not_pulled_to_a_network_of_another_shape(tmp_path: Path) -> None:
    teacher = Teacher.from_module(TimeMLP(2), laws.process(), "v_prediction", shape=(2,))
    run = Trainer(
        DMD2(pull=0.1, ratio=(1, 2)),
        teacher,
        output_dir=tmp_path,
        max_steps=2,
        batch_size=4,
        start=Start(network=smaller(teacher.family.backbone)),
    )
    with pytest.raises(UserError, match="no way between"):
        run.train()


def test_the_penalty_nudges_what_the_network_sees_by_a_tenth_at_every_noise(tmp_path: Path) -> None:
    """A tenth of x_t itself would be 0.2 of EDM's input at its smallest sigma and 0.001 at its largest."""
    teacher = Teacher.from_module(TimeMLP(2), EDM(), "edm", shape=(2,), bottleneck=("hidden", 128))
    seen: list[torch.Tensor] = []
    run = Trainer(DMD2(gan_weight=1e-3, r1_weight=1.0, **PAIRS), teacher, output_dir=tmp_path, max_steps=2, batch_size=64)
    run.start()
    (batch,) = run._micro_batches(0)
    run._roles.modules["fake_score"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        run.method._logits(torch.zeros(64, 2), "gan_real", batch.cond, batch, run._roles, perturb=True)
    run.close()
    plain, nudged = seen
    assert torch.allclose(nudged - plain, 0.1 * batch.noise("gan_real_nudge"), atol=1e-6)
