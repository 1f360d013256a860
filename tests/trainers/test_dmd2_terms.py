"""DMD2: the denoising and GAN terms against their formulas, from full forward passes and hooks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.diffusion.process import expand
from fastdiff.models.roles import Roles
from fastdiff.trainers import DMD2
from fastdiff.trainers.method import Batch


@pytest.fixture(params=["full", "lora"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    """A run whose fake score has left the teacher, and whose GAN weights are unlike each other and unlike one."""
    method = DMD2(fake_score=request.param, gan_weight=0.3, discriminator_weight=0.07, pairs=12, pair_steps=2, rank=4)
    trainer = Trainer(method, tiny_teacher(), output_dir=tmp_path, max_steps=9, batch_size=4)
    trainer.start()
    generator = torch.Generator().manual_seed(3)
    for p in trainer._roles.parameters("fake_score"):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    yield trainer
    trainer.close()


def noised(x: Tensor, name: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and eps of the draws ``name``, by hand."""
    process = batch.teacher.process
    t, eps = batch.times(f"{name}_t", 0, 999), batch.noise(f"{name}_eps")
    return expand(process.alpha(t), x) * x + expand(process.sigma(t), x) * eps, t, eps


def logits(x: Tensor, name: str, cond: Tensor, batch: Batch, roles: Roles) -> Tensor:
    """h of the bottleneck that a full forward pass of the fake score goes through."""
    x_t, t, _ = noised(x, name, batch)
    seen: list[Tensor] = []
    backbone = roles.backbone("fake_score")
    handle = backbone.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    roles.network("fake_score")(x_t, t, cond)
    handle.remove()
    return roles.modules["discriminator"](seen[0])


def close(got: Tensor, want: Tensor) -> bool:
    return bool(want.abs() > 0) and bool((got - want).abs() < 1e-5 * want.abs())


@torch.no_grad()
def test_the_fake_score_learns_unweighted_noise_at_all_times(run: Trainer) -> None:
    """Neither guidance nor the null prompt plays a part; t runs over 0..999 and not over the student's 20..980."""
    batch = run._micro_batches(0)[0]
    terms = run.method.loss("fake_score", batch, run._roles)
    x = batch.memo["x"]
    x_t, t, eps = noised(x, "fake", batch)
    out = run._roles.network("fake_score")(x_t, t, batch.cond)
    assert close(terms["fake_score"], (out - eps).square().mean())


@torch.no_grad()
def test_the_discriminator_is_low_on_samples_and_high_on_results_under_their_own_prompts(run: Trainer) -> None:
    """Halves swapped, a weight of the other player, or the sample's prompt on a stored result: all train without an error."""
    batch = run._micro_batches(0)[0]
    terms = run.method.loss("fake_score", batch, run._roles)
    index = batch.draws.integers("pairs", 0, 12)
    stored = run.method._pairs
    texts = [run.prompts.prompts[i] for i in stored.prompt[index].tolist()]
    on_real = logits(stored.x0[index], "gan_real", run.teacher.encode(texts), batch, run._roles)
    on_fake = logits(batch.memo["x"], "gan_fake", batch.cond, batch, run._roles)
    assert close(terms["discriminator"], 0.07 * ((1 + on_fake.exp()).log().mean() + (1 + (-on_real).exp()).log().mean()))
    assert set(terms) == {"fake_score", "discriminator"}


@torch.no_grad()
def test_the_student_is_told_to_look_real_at_times_of_its_own(run: Trainer) -> None:
    batch = run._micro_batches(0)[0]
    terms = run.method.loss("student", batch, run._roles)
    on_fake = logits(batch.memo["x"], "gan_student", batch.cond, batch, run._roles)
    assert close(terms["gan"], 0.3 * (1 + (-on_fake).exp()).log().mean())
    assert set(terms) == {"dmd", "gan"}


def test_the_students_gan_gradient_is_that_of_the_term_and_adds_to_dmd(run: Trainer) -> None:
    batch, roles = run._micro_batches(0)[0], run._roles
    roles.train_only("student")
    parameters = roles.parameters("student")
    both = torch.autograd.grad(sum(run.method.loss("student", batch, roles).values()), parameters, allow_unused=True)
    dmd = torch.autograd.grad(run.method.loss("student", batch, roles)["dmd"], parameters, allow_unused=True)
    z, t = batch.noise("z"), torch.full((4,), 999)
    a, s = run.teacher.process.alpha(t[0]).float(), run.teacher.process.sigma(t[0]).float()
    x = (z - s * roles.network("student")(z, t, batch.cond)) / a
    term = 0.3 * torch.nn.functional.softplus(-logits(x, "gan_student", batch.cond, batch, roles)).mean()
    gan = torch.autograd.grad(term, parameters, allow_unused=True)
    got = torch.cat([(p - q).flatten() for p, q in zip(both, dmd, strict=True) if p is not None])
    want = torch.cat([g.flatten() for g in gan if g is not None])
    assert want.norm() > 0
    assert (got - want).norm() < 1e-3 * want.norm()
