"""Hyper-SD: its stages and who teaches in which, its loss at both extremes, the adversarial term, the one adapter it delivers."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import TCDScheduler
from safetensors.torch import load_file
from short_runs import shake, started, trainer
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor

from fastdiff.diffusion.process import DiscreteVP
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.lora import KOHYA, LORA
from fastdiff.proof import laws
from fastdiff.trainers import HyperSD
from fastdiff.trainers._segments import sample_tcd
from fastdiff.trainers.method import Calls, Method
from fastdiff.trainers.trajectory import own_generators

TINY = {"pairs": 12, "pair_steps": 2, "rank": 4}
VARIANTS: dict[str, Method] = {
    "gan-feedback": HyperSD(segments=(2,), stage_steps=1, guidance_scale=2.0, feedback_steps=1, drift_weight=0.5, **TINY),
    "eta-1": HyperSD(
        segments=(2, 1),
        stage_steps=2,
        guidance_scale=2.0,
        eta=1.0,
        steps=2,
        original_steps=20,
        distance="pseudo_huber",
        huber_c=0.1,
        gan_segments=1,
        decay=0.5,
        lr=1e-3,
        discriminator_lr=1e-3,
        one_step_steps=3,
        one_step_warmup=1,
        score_weight=0.5,
        multistep_weight=2.0,
        multistep=2,
        fake_score_lr=1e-3,
        **TINY,
    ),
}
OFF = {"guidance_scale": 1.0, "pair_guidance_scale": 1.0, "gan_weight": 0.0}


# --- stages


def test_stages_halve_the_segments_and_the_first_asks_the_guided_teacher() -> None:
    method = HyperSD(stage_steps=3)
    assert [method.segments_at(step) for step in range(0, 15, 3)] == [8, 4, 2, 1, 1]
    kinds = [method.updates(step) for step in range(9)]
    assert kinds[:3] == [("first_stage",)] * 3
    assert kinds[3:6] == [("later_stage",)] * 3
    assert kinds[6:9] == [("later_gan", "discriminator"), ("later_gan",), ("later_gan", "discriminator")]
    assert [round(method.gan_weight_at(step), 4) for step in (6, 8, 9, 11, 40)] == [0.0167, 0.05, 0.0667, 0.1, 0.1]
    assert method.calls(("first_stage",))["teacher"].forward == 2
    assert method.calls(("later_stage",))["previous"].forward == 1


def test_later_stages_can_still_ask_the_guided_teacher() -> None:
    method = HyperSD(stage_steps=1, stage_teacher="first")
    assert [method.updates(step)[0] for step in range(4)] == ["first_stage", "first_stage", "first_gan", "first_gan"]
    assert method.calls(("first_stage",)) == {"student": Calls(1, 1), "target": Calls(1, 0), "teacher": Calls(2, 0)}
    with pytest.raises(UserError, match="stage_teacher"):
        HyperSD(stage_teacher="second")  # type: ignore[arg-type]


def test_a_stage_begins_from_the_averaged_student_of_the_one_before_which_is_its_teacher_and_its_target(tmp_path: Path) -> None:
    method = HyperSD(segments=(4, 2), stage_steps=3, lr=1e-2, **OFF, **TINY)
    with started(method, tmp_path, warmup_steps=0, ema_decay=0.9) as run:
        roles = run._roles
        run.advance()  # the previous student is the untrained one, and the target has gone a part of the way
        assert all(torch.equal(p, torch.zeros_like(p)) for k, p in roles.adapter("previous").items() if ".lora_B." in k)
        for own, mean in zip(roles.parameters("student"), roles.parameters("target"), strict=True):
            assert not torch.equal(own, mean) or own.abs().max() == 0
        for _ in range(2):
            run.advance()
        averaged = [p.clone() for p in run._ema.shadow_params]
        roles.follow("target", "student", 0.0)
        seen: list[list[Tensor]] = []
        original = method.loss

        def loss(*inputs: object) -> dict[str, Tensor]:
            seen.append([p.clone() for name in ("student", "previous", "target") for p in roles.parameters(name)])
            return original(*inputs)  # type: ignore[arg-type]

        method.loss = loss  # type: ignore[method-assign]
        run.advance()
        for start, want in zip(seen[0], averaged * 3, strict=True):
            assert torch.equal(start, want)
        states = run._optimizers["student"].optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {1}


def test_the_target_moves_by_its_decay_and_not_with_the_discriminator(tmp_path: Path) -> None:
    with started(HyperSD(decay=0.75, stage_steps=1, **TINY), tmp_path) as run:
        shake(run)
        before, student = ([p.clone() for p in run._roles.parameters(name)] for name in ("target", "student"))
        run.method.after("discriminator", run._roles)
        assert all(map(torch.equal, before, run._roles.parameters("target")))
        run.method.after("later_gan", run._roles)
        for old, ahead, now in zip(before, student, run._roles.parameters("target"), strict=True):
            assert torch.allclose(now, 0.75 * old + 0.25 * ahead, atol=1e-7)


# --- the loss


@pytest.mark.parametrize("step", [0, 1])
def test_the_loss_is_the_squared_distance_of_the_two_jumps(step: int, tmp_path: Path) -> None:
    """By hand; the later stage's step is that of the previous student, unguided."""
    with started(
        HyperSD(segments=(4, 2), stage_steps=1, guidance_scale=3.0, gan_weight=0.0, **TINY), tmp_path, batch_size=16
    ) as run:
        shake(run)
        batch, roles, method = run._micro_batches(step)[0], run._roles, run.method
        got = method.loss(method.updates(step)[0], batch, roles)["consistency"]
        _, x0, cond = run.method.draw_pairs(batch)
        k, n = (4, 2)[step], batch.draws.integers("n", 0, 50)
        edges = torch.tensor([j * 50 // k for j in range(k + 1)])
        low = torch.stack([(20 * edges[edges <= i].max() - 1).clamp(min=0) for i in n])
        t, u = 20 * n + 19, (20 * n - 1).clamp(min=0)
        end = (low + batch.draws.uniform("t_end") * (u + 1 - low)).floor().long()
        assert (low < t).all()
        assert (low <= end).all()
        assert (end <= u).all()
        x_t = run.teacher.process.add_noise(x0, batch.noise("eps"), t)
        with torch.no_grad():
            if step == 0:
                x_u = ddim_step(roles.denoiser("teacher").guided(x_t, t, cond, batch.null, 3.0), u)
            else:
                x_u = ddim_step(roles.denoiser("previous")(x_t, t, cond), u)
            jumps = [ddim_step(roles.denoiser(r)(x, s, cond), end) for r, x, s in (("student", x_t, t), ("target", x_u, u))]
        jumps[1] = torch.where((end == u)[:, None, None, None], x_u, jumps[1])
    assert got.item() == pytest.approx((jumps[0] - jumps[1]).square().mean().item(), rel=1e-4)
    assert got > 1e-6


def test_with_a_segment_for_each_time_the_teacher_s_own_network_has_no_loss(tmp_path: Path) -> None:
    """Every end is u itself, an edge: the loss is regression on the teacher's step."""
    method = HyperSD(segments=(20,), original_steps=20, stage_steps=1, **OFF, **TINY)
    with started(method, tmp_path, batch_size=32) as run:
        batch = run._micro_batches(0)[0]
        _, lower, _ = method.neighbours(batch.draws.integers("n", 0, 20))
        assert torch.equal(method.end(batch, lower, lower), lower)
        assert method.loss("first_stage", batch, run._roles)["consistency"].item() < 1e-11
        shake(run)
        assert method.loss("first_stage", batch, run._roles)["consistency"].item() > 1e-7


def test_in_one_segment_that_ends_clean_the_loss_is_cd_s(tmp_path: Path) -> None:
    """The squared distance of both x0, as in consistency distillation."""
    table = laws.process().alphas_cumprod.clone()  # type: ignore[attr-defined]
    table[0] = 1 - 1e-15
    teacher = Teacher.from_module(TimeMLP(3), DiscreteVP(table), "v_prediction", shape=(3,))
    with started(HyperSD(segments=(1,), stage_steps=1, **OFF, **TINY), tmp_path, teacher, batch_size=64) as run:
        shake(run)
        batch, roles = run._micro_batches(0)[0], run._roles
        batch.draws.uniform = lambda name: torch.zeros(64, dtype=torch.float64)
        got = run.method.loss("first_stage", batch, roles)["consistency"]
        _, x0, cond = run.method.draw_pairs(batch)
        t = 20 * batch.draws.integers("n", 0, 50) + 19
        u = (t - 20).clamp(min=0)
        x_t = teacher.process.add_noise(x0, batch.noise("eps"), t)
        x_u = ddim_step(roles.denoiser("teacher")(x_t, t, cond), u)
        aim = torch.where((u == 0)[:, None], x_u, roles.denoiser("target")(x_u, u, cond).x0)
        want = (roles.denoiser("student")(x_t, t, cond).x0 - aim).square().mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert want > 1e-4


# --- the adversarial term


def test_the_discriminator_sees_both_jumps_at_one_later_time_through_the_frozen_teacher(tmp_path: Path) -> None:
    """Of equal jumps it cannot tell which is which, and its loss is at least 2; no gradient reaches any adapter from it."""
    method = HyperSD(segments=(2,), stage_steps=1, guidance_scale=2.0, **TINY)
    with started(method, tmp_path, batch_size=16) as run:
        shake(run)
        roles, batch = run._roles, run._micro_batches(0)[0]
        asked: list[tuple[Tensor, Tensor]] = []
        own = roles.features
        roles.features = lambda name, x, t, cond: (asked.append((x, t)), own(name, x, t, cond))[1]  # type: ignore[method-assign]
        roles.train_only("student")
        terms = method.loss("first_gan", batch, roles)
        assert terms["gan"].requires_grad
        fake, real, end, _ = batch.memo["jumps"]
        roles.train_only("discriminator")
        loss = method.loss("discriminator", batch, roles)["discriminator"]
        loss.backward()
        assert all(p.grad is not None for p in roles.parameters("discriminator"))
        assert all(p.grad is None for p in roles.parameters("student"))
        (x_g, s_g), (x_real, s_real), (x_fake, s_fake) = asked
        assert torch.equal(s_g, s_real)
        assert torch.equal(s_g, s_fake)
        low, high = method.segment(batch)
        assert (end >= low).all()
        assert (s_g >= end).all()
        assert (s_g <= high).all()
        assert torch.equal(x_g.detach(), x_fake)
        scale = (run.teacher.process.alpha(s_g) / run.teacher.process.alpha(end))[:, None, None, None].float()
        assert ((x_real - x_fake) - scale * (real - fake)).abs().max() < 1e-5  # one noise for both
        batch.memo["jumps"] = (real, real, end, batch.memo["jumps"][3])
        assert method.loss("discriminator", batch, roles)["discriminator"].item() >= 2


# --- one step


ONE = {"segments": (2, 1), "stage_steps": 2, "one_step_steps": 2, "gan_weight": 0.0}


def test_the_one_step_stage_follows_the_others_and_its_fake_score_goes_ahead() -> None:
    method = HyperSD(**{**ONE, "one_step_steps": 3}, one_step_warmup=1)
    kinds = [method.updates(step) for step in range(9)]
    assert kinds == [("first_stage",)] * 2 + [("later_stage",)] * 2 + [("fake_score",)] + [("one_step", "fake_score")] * 4
    assert [method.segments_at(step) for step in (0, 2, 4, 8)] == [2, 1, 1, 1]
    assert [step for step in range(9) if method.restarts(step)] == [2, 5]  # from its average, where it goes on itself


def test_the_one_step_terms_by_hand(tmp_path: Path) -> None:
    """DMD's gradient, and the distance to what the frozen student of the last stage makes of the same noise in several steps."""
    method = HyperSD(**ONE, guidance_scale=3.0, multistep=2, score_weight=0.5, multistep_weight=2.0, **TINY)
    with started(method, tmp_path, batch_size=8) as run:
        shake(run)
        roles, batch, process = run._roles, run._micro_batches(4)[0], run.teacher.process
        roles.train_only("student")
        terms = method.loss("one_step", batch, roles)
        z, cond = batch.noise("z"), batch.cond
        row = torch.zeros(8, dtype=torch.long)
        with torch.no_grad():
            x = ddim_step(roles.denoiser("student")(z, row + 999, cond), row)
            first = ddim_step(roles.denoiser("previous")(z, row + 999, cond), row + 499)
            several = ddim_step(roles.denoiser("previous")(first, row + 499, cond), row)
            t = method.times("student_t", batch)
            x_t = process.add_noise(x, batch.noise("student_eps"), t)
            real = roles.denoiser("teacher").guided(x_t, t, cond, batch.null, 3.0).x0
            gradient = roles.denoiser("fake_score")(x_t, t, cond).x0 - real
            gradient = gradient / (x - real).abs().mean((1, 2, 3), keepdim=True)
        assert terms["multistep"].item() == pytest.approx(2 * (x - several).square().mean().item(), rel=1e-4)
        assert terms["score"].item() == pytest.approx(0.25 * gradient.square().mean().item(), rel=1e-4)
        assert (x - several).square().mean() > 1e-6
        _, x0, text = method.draw_pairs(batch)
        t = 20 * batch.draws.integers("kept", 0, 49) + 19
        x_t = process.add_noise(x0, batch.noise("kept_eps"), t)
        with torch.no_grad():
            both = [roles.denoiser(name)(x_t, t, text).x0 for name in ("student", "previous")]
        assert terms["kept"].item() == pytest.approx((both[0] - both[1]).square().mean().item(), rel=1e-4)
        assert terms.keys() == {"kept", "score", "multistep"}
        assert batch.memo["x"].requires_grad is False
        roles.train_only("fake_score")
        fake = method.loss("fake_score", batch, roles)["fake_score"]
        fake.backward()
        assert any(p.grad.abs().max() > 0 for p in roles.parameters("fake_score"))
        assert all(p.grad is None for name in ("student", "previous", "target") for p in roles.parameters(name))


# --- the adapter


def test_one_adapter_makes_of_the_teacher_s_pipeline_a_student_of_1_to_8_steps(tmp_path: Path) -> None:
    """load_lora_weights and TCDScheduler alone, from both files; and the teacher is as it was."""
    teacher = tiny_teacher()
    base = copy.deepcopy(teacher.pipeline)
    method = HyperSD(segments=(2, 1), stage_steps=3, lr=3e-2, guidance_scale=2.0, **TINY)
    run = trainer(method, tmp_path, teacher, max_steps=6, warmup_steps=0)
    pipeline = run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    prompts, noise = run.samples[0][:2], run.samples[1][:2]
    student = Denoiser(teacher.family.network(pipeline.unet), teacher.process, teacher.prediction_type)

    def draw(steps: int, eta: float) -> Tensor:
        draws = own_generators(2)
        call = {"num_inference_steps": steps, "eta": eta, "guidance_scale": 1.0}
        return base(prompts, latents=noise, generator=draws, output_type="pt", **call).images

    base.scheduler = TCDScheduler.from_config(base.scheduler.config)
    without = draw(4, 0.3)
    for name in (LORA, KOHYA):
        base.load_lora_weights(str(tmp_path), weight_name=name)
        for steps, eta in ((1, 0.3), (2, 0.3), (4, 0.0), (8, 1.0)):
            levels = HyperSD(steps=steps).levels()
            with torch.no_grad():
                x = sample_tcd(student, noise, teacher.encode(prompts), levels, eta, own_generators(2))
            assert (draw(steps, eta) - teacher.decode(x)).abs().max() < 1e-5, (name, steps)
        assert (draw(4, 0.3) - without).abs().max() > 1e-2
        base.unload_lora_weights()
    assert torch.equal(draw(4, 0.3), without)
    card = (tmp_path / "README.md").read_text()
    assert "TCDScheduler.from_config" in card
    assert "num_inference_steps=4, eta=0.3, guidance_scale=1.0" in card


def test_of_a_transformer_the_adapter_s_layers_are_named_as_its_pipeline_names_them(tmp_path: Path) -> None:
    method = HyperSD(segments=(1,), stage_steps=2, eta=0.0, original_steps=40, guidance_scale=2.0, **TINY)
    run = trainer(method, tmp_path, tiny_flow_teacher(), max_steps=2)
    run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / LORA))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"segments": (4, 4)}, "segments"),
        ({"segments": (80, 1)}, "segments"),
        ({"segments": ()}, "segments"),
        ({"stage_steps": 0}, "stage_steps"),
        ({"decay": 1.0}, "decay"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"discriminator_lr": 0.0}, "discriminator_lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        HyperSD(**fields)  # type: ignore[arg-type]


def test_a_run_too_short_for_its_stages_is_refused_with_the_number_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps=12"):
        trainer(HyperSD(stage_steps=3), tmp_path, max_steps=9)
