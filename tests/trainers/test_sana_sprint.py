"""SANA-Sprint: the exact change to TrigFlow, who gets gradient, the last time, misaligned pairs, told scales, the stock folder."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import distance, gradients, shake, started, trainer
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor, nn

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import RectifiedFlow, TrigFlow
from fastdiff.errors import UserError
from fastdiff.models.condition import split_guidance, take
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.sprint import flow_time, sprint_times
from fastdiff.trainers import SCM, SanaSprint
from fastdiff.trainers._tangents import trigflow_network
from fastdiff.trainers.method import Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "told": SanaSprint(**_FEW, guidance_choices=(2.0, 3.0), guidance_scale=2.5, tangent_warmup=0, steps=4, adaptation_steps=1),
    "plain": SanaSprint(
        **_FEW, guidance_choices=(), guidance_scale=2.0, gan="softplus", r1_weight=0.1, misaligned=False, steps=1, taps=(1.0,)
    ),
}
TOLD: dict[str, Any] = {**_FEW, "guidance_choices": (1.0, 2.0, 3.0), "guidance_scale": 2.0}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- from flow to TrigFlow


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_a_wrapped_flow_network_is_trigflow_s_own_f_of_a_mixture(sigma_data: float) -> None:
    """To round-off in float64: no step of the change is an approximation."""
    flow = GaussianMixture.ring(RectifiedFlow())
    network = lambda x, t, cond: flow(x, t / 1000).velocity  # noqa: E731
    wrapped = trigflow_network(Denoiser(network, flow.process, "flow_prediction"), sigma_data, None)
    trig = flow.under(TrigFlow(sigma_data=sigma_data))
    generator = torch.Generator().manual_seed(0)
    y, t = 3 * torch.randn(200, 2, dtype=torch.float64, generator=generator), torch.linspace(0.02, 1.55, 200, dtype=torch.float64)
    want = trig(sigma_data * y, t).trigflow
    assert (wrapped(y, t) - want).abs().max() < 1e-12 * want.abs().max()
    assert want.std() > 0.5


def test_half_way_f_is_half_the_velocity_over_q_and_nothing_of_the_state() -> None:
    """At s = 1/2 the state's weight 1 - 2s is zero and the velocity's q^2 / q = q: (0, 1/2) / q."""
    generator = torch.Generator().manual_seed(0)
    y, u = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append(x)
        assert torch.allclose(t, torch.full_like(t, 500.0))
        return u

    t = torch.full((5,), math.pi / 4, dtype=torch.float64)
    found = trigflow_network(Denoiser(network, RectifiedFlow(), "flow_prediction"), 1.0, None)(y, t)
    q = 0.5**0.5
    assert (found - 0.5 * u / q).abs().max() < 1e-14
    assert (seen[0] - q * y).abs().max() < 1e-14


# --- the losses


@pytest.fixture(params=[tiny_teacher, tiny_flow_teacher], ids=["unet", "sana"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return request.param()  # type: ignore[no-any-return]


def test_neither_player_s_update_gives_gradient_to_the_other_or_to_the_teacher(teacher: Teacher, tmp_path: Path) -> None:
    with started(SanaSprint(**TOLD), tmp_path, teacher) as run:
        shake(run)
        (batch,) = run._micro_batches(0)
        for update in ("student", "discriminator"):
            trained = run.method.trains(update)
            run._roles.train_only(*trained)
            sum(run.method.loss(update, batch, run._roles).values()).backward()  # type: ignore[union-attr]
            for name in ("student", "weight", "discriminator"):
                found = [p.grad for p in run._roles.parameters(name)]
                assert all((g is not None) == (name in trained) for g in found), (update, name)
                for p in run._roles.parameters(name):
                    p.grad = None
            assert all(p.grad is None for p in teacher.family.backbone.parameters())


def test_its_consistency_term_is_scm_s_own(tmp_path: Path, float64: None) -> None:
    """Beside an SCM with the same settings: the same gradient; and the weights of both terms multiply theirs."""
    fields: dict[str, Any] = {**_FEW, "guidance_scale": 2.0, "log_mean": 0.3, "tangent_warmup": 0, "extra_weight": "inv_sigma"}
    own: dict[str, Any] = {**fields, "guidance_choices": ()}
    found = {}
    for name, method in {
        "scm": SCM(**fields, pair_guidance_scale=4.5),
        "alone": SanaSprint(**own, adversarial_weight=0.0),
        "both": SanaSprint(**own, scm_weight=2.0, adversarial_weight=3.0),
        "gan": SanaSprint(**own, scm_weight=0.0, adversarial_weight=1.0),
    }.items():
        with started(method, tmp_path / name) as run:
            for p in run._roles.parameters("student"):
                p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            if name in {"both", "gan"}:
                for p in run._roles.parameters("discriminator"):
                    p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
            found[name] = gradients(run)["0 student student"]
    assert distance(found["alone"], found["scm"]) < 1e-10
    assert distance(found["both"], 2 * found["scm"] + 3 * found["gan"]) < 1e-10
    assert found["gan"].norm() > 1e-4


def test_the_share_of_the_last_time_is_that_of_a_coin(tmp_path: Path) -> None:
    n = 2000
    law = GaussianMixture.ring(RectifiedFlow())
    teacher = Teacher.from_module(TimeMLP(2), law.process, "flow_prediction", shape=(2,), law=law, bottleneck=("hidden", 128))
    method = SanaSprint(**_FEW, guidance_choices=(), guidance_scale=1.0, max_time_share=0.3, pair_guidance_scale=1.0)
    with started(method, tmp_path, teacher, batch_size=n) as run:
        seen: list[tuple[Tensor, Tensor]] = []
        run._roles.modules["student"].register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1])))
        (batch,) = run._micro_batches(0)
        method.generate(batch, run._roles)
        (x_t, t), z = seen[0], batch.noise("gan_z")
        last = t == 1000
        assert abs(last.double().mean() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
        assert torch.equal(x_t[last], z[last])
        assert method._moments(batch, run._roles)[1].max() < math.pi / 2  # L_scm keeps to its own times


def test_from_the_last_time_one_step_knows_nothing_of_the_data(tmp_path: Path) -> None:
    """Two batches with other stored results and the same noise: the same samples where t is pi / 2, others elsewhere."""
    with started(SanaSprint(**TOLD), tmp_path, tiny_flow_teacher(), batch_size=16) as run:
        method: Any = run.method
        (batch,) = run._micro_batches(0)
        end = method.at_end(batch)
        one, _ = method.generate(batch, run._roles)
        draw = method.draw_pairs
        method.draw_pairs = lambda batch, **options: (draw(batch)[0], draw(batch)[1] + 1.0, draw(batch)[2])
        other, _ = method.generate(batch, run._roles)
    assert 0 < end.sum() < 16
    assert torch.equal(one[end], other[end])
    assert (one - other)[~end].flatten(1).abs().amax(1).min() > 1e-3


def test_misaligned_pairs_are_real_samples_under_a_prompt_that_is_not_theirs(tmp_path: Path) -> None:
    with started(SanaSprint(**{**TOLD, "pairs": 32}), tmp_path, tiny_flow_teacher(), batch_size=32) as run:
        method: Any = run.method
        (batch,) = run._micro_batches(0)
        batch.memo["fake"] = batch.noise("x")
        seen: dict[str, Any] = {}
        judging = method.judging
        method.judging = lambda real, fakes, *rest: seen.update(real=real, **fakes) or judging(real, fakes, *rest)
        terms = method.loss("discriminator", batch, run._roles)
        x, cond, counts = seen["misaligned"]
        stored = method._pairs
    assert torch.isfinite(terms["discriminator"])
    which = (x[:, None] == stored.x0[None]).flatten(2).all(2).int().argmax(1)  # whose result it is
    theirs = run.prompts.conditions(stored.prompt[which])
    differ = torch.tensor([not torch.equal(take(theirs, slice(i, i + 1))["states"], cond["states"][i : i + 1]) for i in range(32)])
    assert torch.equal(counts.bool(), differ)
    assert 0 < differ.sum() < 32
    assert torch.equal(cond["states"], seen["real"][1]["states"])


@pytest.mark.parametrize(("gan", "value"), [("softplus", 2 * math.log(2)), ("hinge", 2.0)])
def test_heads_that_say_nothing_have_the_loss_of_a_guess(gan: Any, value: float, tmp_path: Path) -> None:
    with started(SanaSprint(**TOLD, gan=gan, misaligned=False), tmp_path) as run:
        for head in run._roles.modules["discriminator"].heads:
            nn.init.zeros_(head.logit.weight)
            nn.init.zeros_(head.logit.bias)
        (batch,) = run._micro_batches(0)
        batch.memo["fake"] = batch.noise("x")
        assert run.method.loss("discriminator", batch, run._roles)["discriminator"].item() == pytest.approx(value, rel=1e-6)


def test_an_update_without_a_finite_gradient_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(SanaSprint(**TOLD), tmp_path, warmup_steps=0) as run:
        before = [p.clone() for p in run._roles.parameters("student")]
        heads = [p.clone() for p in run._roles.parameters("discriminator")]
        fooling = SanaSprint.fooling
        monkeypatch.setattr(SanaSprint, "fooling", lambda *args: fooling(*args) * torch.nan)
        run.advance()
        assert all(torch.equal(p, q) for p, q in zip(run._roles.parameters("student"), before, strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(run._roles.parameters("discriminator"), heads, strict=True))
        assert run._health.total == 1


# --- what the student is told


def test_a_sample_is_told_the_scale_of_its_own_velocity(tmp_path: Path) -> None:
    """The guided velocity is recomputed for each sample at the scale that its condition says."""
    with started(SanaSprint(**TOLD), tmp_path, tiny_flow_teacher(), batch_size=24) as run:
        method: Any = run.method
        (batch,) = run._micro_batches(0)
        x_t, t, velocity, cond = method._moments(batch, run._roles)
        text, scale = split_guidance(method.told(cond, batch))
        assert set(scale.tolist()) == {1.0, 2.0, 3.0}
        assert torch.equal(text["states"], cond["states"])
        teacher = run._roles.denoiser("teacher")
        for value in (1.0, 3.0):
            rows = scale == value
            s = flow_time(t)
            q = (s.square() + (1 - s).square()).sqrt()
            x = (q[:, None, None, None] * x_t).float()
            with torch.no_grad():
                want = teacher.guided(x[rows], s[rows], take(cond, rows), take(batch.null, rows), value)
            u, at = want.output("flow_prediction"), s[rows][:, None, None, None]
            f = ((1 - 2 * at) * x[rows] + (1 - 2 * at + 2 * at.square()) * u) / q[rows][:, None, None, None]
            assert (velocity[rows] - f).abs().max() < 1e-4


def test_after_one_step_of_its_last_layer_the_student_hears_its_scale(tmp_path: Path) -> None:
    """Zeros in every layer of the embedding would have no gradient: only the last one starts at zero."""
    teacher = tiny_flow_teacher()
    with started(SanaSprint(**TOLD), tmp_path, teacher, warmup_steps=0) as run:
        method: Any = run.method
        z, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), teacher.encode(["a red boot", "a bag"])

        def at(scale: float) -> Tensor:
            method.guidance_scale = scale
            with torch.no_grad():
                sample: Tensor = method.sample(run._roles.denoiser("student"), z, cond, torch.Generator().manual_seed(0))
            return sample

        assert torch.equal(at(1.0), at(3.0))
        method.guidance_scale = 2.0
        run._iteration(0)
        assert not torch.equal(at(1.0), at(3.0))


def test_adaptation_is_regression_on_the_guided_teacher_and_comes_first(tmp_path: Path) -> None:
    method = SanaSprint(**TOLD, adaptation_steps=2, tangent_warmup=4)
    assert [method.updates(step) for step in (0, 1, 2)] == [("adaptation",)] * 2 + [("student", "discriminator")]
    with pytest.raises(UserError, match="nothing is distilled"):
        method.check_length(2)
    with started(method, tmp_path, tiny_flow_teacher()) as run:
        (batch,) = run._micro_batches(0)
        loss = run.method.loss("adaptation", batch, run._roles)["adaptation"]
        x_t, t, velocity, cond = method.__class__._moments(run.method, batch, run._roles)  # type: ignore[arg-type]
        network = trigflow_network(run._roles.denoiser("student"), 1.0, run.method.told(cond, batch))  # type: ignore[attr-defined]
        assert loss.item() == pytest.approx((network(x_t, t) - velocity).square().mean().item(), rel=1e-5)
        assert run.method.iteration(run._micro_batches(5)[0]) == 3  # type: ignore[attr-defined]


# --- sampling and export


@pytest.mark.parametrize(("steps", "times"), [(1, [1.5708]), (2, [1.5708, 1.3]), (4, [1.5708, 1.1781, 0.7854, 0.3927])])
def test_the_folder_is_a_stock_sprint_pipeline_that_repeats_the_trainer_s_samples(
    steps: int, times: list[float], tmp_path: Path
) -> None:
    run = trainer(SanaSprint(**TOLD, steps=steps), tmp_path, tiny_flow_teacher(shift=3.0), max_steps=2)
    run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    assert sprint_times(steps) == pytest.approx(times)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    call = json.loads((tmp_path / "fastdiff.json").read_text())["call"]
    assert call["guidance_scale"] == 2.0
    assert call["num_inference_steps"] == steps


def test_the_step_between_two_times_is_the_scheduler_s(tmp_path: Path) -> None:
    """With one network call after another by hand, in TrigFlow's own state."""
    teacher = tiny_flow_teacher()
    with started(SanaSprint(**TOLD), tmp_path, teacher) as run:
        method: Any = run.method
        student, cond = run._roles.denoiser("student"), method._told_to_sample(teacher.encode(["a bag"]))
        z, fresh = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        f, x = trigflow_network(student, 1.0, cond), z
        with torch.no_grad():
            for t, following in ((1.5708, 1.3), (1.3, None)):
                angle = torch.tensor([t], dtype=torch.float64)
                x0 = math.cos(t) * x - math.sin(t) * f(x, angle.clamp(max=math.pi / 2 - 1e-9))
                x = x0 if following is None else math.cos(following) * x0 + math.sin(following) * fresh
            got = run.method.sample(student, z, teacher.encode(["a bag"]), torch.Generator().manual_seed(1))
    assert (got - x).abs().max() < 1e-4


# --- settings


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 9.0},
        {"guidance_choices": (0.0, 2.0), "guidance_scale": 1.0},
        {"scm_weight": 0.0, "adversarial_weight": 0.0},
        {"adversarial_weight": -1.0},
        {"kind": "sct"},
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        SanaSprint(**fields)


def test_a_sana_student_must_be_told_a_scale_and_a_module_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"guidance_choices is empty.*\(4\.5,\)"):
        trainer(SanaSprint(guidance_choices=()), tmp_path, tiny_flow_teacher())
    trainer(SanaSprint(guidance_choices=(4.5,)), tmp_path, tiny_flow_teacher())

    class Untold(TimeMLP):
        with_guidance_embedding = property()  # as a network of the user's, which has none

    module = Teacher.from_module(Untold(2), RectifiedFlow(), "flow_prediction", shape=(2,), bottleneck=("hidden", 128), name="law")
    with pytest.raises(UserError, match=r"law: .*guidance_choices=\(\)"):
        trainer(SanaSprint(), tmp_path, module)
