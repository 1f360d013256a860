"""SwiftBrush: what its losses are, term by term."""

from pathlib import Path

import torch
from tiny import tiny_teacher

from fastdiff import Trainer
from fastdiff.diffusion.process import expand
from fastdiff.trainers import SwiftBrush
from fastdiff.trainers.method import Method, one_step

TINY = {"rank": 4, "lora_alpha": 8.0, "pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "cold-null": SwiftBrush(null_probability=1.0, **TINY),
    "warm": SwiftBrush(null_probability=0.0, warm_start_steps=2, fake_score_warmup=1, **TINY),
}


def started(tmp_path: Path, **fields: object) -> Trainer:
    run = Trainer(SwiftBrush(rank=4, **fields), tiny_teacher(), output_dir=tmp_path, max_steps=9, batch_size=4)
    run.start()
    return run


def shake(run: Trainer, role: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in run._roles.parameters(role):
        p.data += 0.05 * torch.randn(p.shape, generator=generator)


def test_equal_scores_give_the_student_exactly_zero_gradient(tmp_path: Path) -> None:
    run = started(tmp_path)  # a fresh LoRA adapter computes the teacher
    run._backward("student", run._micro_batches(0), ("student",))
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in run._roles.parameters("student"))
    run.close()


def test_student_gradient_is_the_formula(tmp_path: Path) -> None:
    run = started(tmp_path, guidance_scale=3.0)
    shake(run, "fake_score")
    batch = run._micro_batches(0)[0]
    run._backward("student", [batch], ("student",))
    got = torch.cat([p.grad.flatten() for p in run._roles.parameters("student") if p.grad is not None])
    for p in run._roles.parameters("student"):
        p.grad = None

    roles, process = run._roles, run.teacher.process
    x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
    t, eps = batch.times("student_t", 20, 980), batch.noise("student_eps")
    alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
    x_t = (alpha * x + sigma * eps).detach()
    with torch.no_grad():
        e = {}
        for name in ("teacher", "fake_score"):
            net = roles.network(name)
            cond, null = net(x_t, t, batch.cond), net(x_t, t, batch.null)
            e[name] = null + 3.0 * (cond - null)
        gradient = sigma**2 * (e["teacher"] - e["fake_score"])
    (gradient * x).sum().div(x.numel()).backward()
    want = torch.cat([p.grad.flatten() for p in roles.parameters("student") if p.grad is not None])
    run.close()
    assert want.norm() > 0
    assert (got - want).norm() < 1e-4 * want.norm()


def test_fake_score_learns_alpha_weighted_noise_on_the_detached_sample(tmp_path: Path) -> None:
    run = started(tmp_path, null_probability=0.0)
    batch = run._micro_batches(0)[0]
    run._backward("student", [batch], ("student",))
    x = batch.memo["x"]
    assert not x.requires_grad
    loss = run.method.loss("fake_score", batch, run._roles)["fake_score"]
    process = run.teacher.process
    t, eps = batch.times("fake_t", 0, 999), batch.noise("fake_eps")
    out = run._roles.network("fake_score")(process.add_noise(x, eps, t), t, batch.cond)
    alpha = expand(process.alpha(t), x)
    want = (alpha * out - alpha * eps).square().mean()
    run.close()
    assert abs(loss - want) < 1e-5 * want


def test_the_null_prompt_replaces_the_whole_batch_or_nobody(tmp_path: Path) -> None:
    seen = []
    for probability in (0.0, 1.0):
        run = started(tmp_path / str(probability), null_probability=probability)
        batch = run._micro_batches(0)[0]
        batch.memo["x"] = batch.noise("z")
        network = run._roles.network

        def spy(name: str, network: object = network) -> object:
            call = network(name)

            def record(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
                seen.append(cond)
                return call(x, t, cond)

            return record

        run._roles.network = spy
        run.method.loss("fake_score", batch, run._roles)
        expected = batch.cond if probability == 0 else batch.null
        assert torch.equal(seen[-1], expected)
        run.close()


def test_null_choices_have_the_stated_frequency(tmp_path: Path) -> None:
    run = started(tmp_path)
    share = sum(run._micro_batches(step)[0].draws.choice("null") < 0.1 for step in range(2000)) / 2000
    run.close()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5


def test_times_cover_their_ranges(tmp_path: Path) -> None:
    run = started(tmp_path)
    student = torch.cat([run._micro_batches(s)[0].times("student_t", 20, 980) for s in range(2000)])
    run.close()
    assert student.min() >= 20
    assert student.max() <= 980
    assert student.min() < 30
    assert student.max() > 970


def test_warm_start_regresses_first_and_makes_no_pairs_without(tmp_path: Path) -> None:
    warm = SwiftBrush(warm_start_steps=2)
    assert [warm.updates(s) for s in (0, 1, 2)] == [("regression",), ("regression",), ("student", "fake_score")]
    assert warm.lr_of("student", 1) == warm.regression_lr
    assert warm.lr_of("student", 2) == warm.lr
    run = started(tmp_path)
    assert not list(tmp_path.glob("pairs*"))
    run.close()


def test_a_teacher_that_puts_out_nan_is_noticed(tmp_path: Path) -> None:
    """Zeroed in the gradient, it would train nothing with loss 0 to the end, and export the untrained student."""
    run = started(tmp_path)
    before = [p.clone() for p in run._roles.parameters("student")]
    run.teacher.family.backbone.conv_out.bias.data[0] = torch.nan
    run.advance()
    assert run._health.in_a_row["student"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run._roles.parameters("student"), strict=True))
    run.close()
