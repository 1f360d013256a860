"""LCM: its loss against one written by hand and against an exact flow map, its target, and what its range asks of a teacher."""

from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from short_runs import shake, started
from tiny import tiny_teacher
from torch import Tensor, nn

from fastdiff import Trainer
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import LCM, _latent
from fastdiff.trainers._plan import plan
from fastdiff.trainers.config import Config
from fastdiff.trainers.method import Method

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "range-4-steps": LCM(guidance_range=(2.0, 4.0), sample_guidance_scale=2.5, decay=0.5, **PAIRS),
    "one-scale-2-steps": LCM(guidance_range=(2.0, 2.0), steps=2, original_steps=20, distance="squared", lr=1e-3, **PAIRS),
}


# --- the loss


def by_hand(run: Trainer, n: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """The sheet's algorithm on raw networks and diffusers' alphas_cumprod, in the paper's w = s - 1."""
    method, roles, teacher = run.method, run._roles, run.teacher.family.backbone
    _, x0, text = method.draw_pairs(run._micro_batches(0)[0])
    table = run.teacher.pipeline.scheduler.alphas_cumprod.double()
    w = scale - 1
    emb = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w.float(), 256)
    t = 20 * (n + 1) - 1
    u = (t - 20).clamp(min=0)
    a_t, s_t, a_u, s_u = (
        c[:, None, None, None].float() for c in (table[t].sqrt(), (1 - table[t]).sqrt(), table[u].sqrt(), (1 - table[u]).sqrt())
    )
    x_t = a_t * x0 + s_t * noise
    eps = roles.modules["student"](x_t, t, text, timestep_cond=emb).sample
    prediction = (x_t - s_t * eps) / a_t
    with torch.no_grad():
        eps_c, eps_0 = (teacher(x_t, t, c.expand_as(text)).sample for c in (text, run.teacher.null))
        x_c, x_0 = ((x_t - s_t * e) / a_t for e in (eps_c, eps_0))
        w = w[:, None, None, None].float()
        x_u = a_u * (x_c + w * (x_c - x_0)) + s_u * (eps_c + w * (eps_c - eps_0))
        aim = (x_u - s_u * roles.modules["target"](x_u, u, text, timestep_cond=emb).sample) / a_u
        c_skip = (0.25 / ((10.0 * u) ** 2 + 0.25))[:, None, None, None]
        c_out = (10.0 * u / ((10.0 * u) ** 2 + 0.25).sqrt())[:, None, None, None]
        aim = c_skip * x_u + c_out * aim
    return (((prediction - aim) ** 2 + 1e-6).sqrt() - 1e-3).mean()


def test_the_loss_is_that_of_the_paper_s_algorithm(tmp_path: Path) -> None:
    """Twenty of fifty times, the first among them; c_skip of every other one is below 7e-6."""
    with started(LCM(**PAIRS), tmp_path, batch_size=20) as run:
        shake(run)
        batch = run._micro_batches(0)[0]
        n = batch.draws.integers("n", 0, 50)
        n[0] = 0
        batch.draws.integers = lambda name, low, high, own=batch.draws.integers: n if name == "n" else own(name, low, high)
        scale = 6 + 10 * batch.draws.uniform("guidance_scale")
        got = run.method.loss("student", batch, run._roles)["consistency"]
        want = by_hand(run, n, scale, batch.noise("eps"))
        assert got.item() == pytest.approx(want.item(), rel=1e-6, abs=1e-6)
        assert want > 0.01


def test_neither_target_nor_teacher_has_a_part_in_the_gradient(tmp_path: Path) -> None:
    """Even with every weight asking for one."""
    with started(LCM(**PAIRS), tmp_path) as run:
        shake(run)
        own = [p for name in ("student", "target") for p in run._roles.modules[name].parameters()]
        for p in [*own, *run.teacher.family.backbone.parameters()]:
            p.requires_grad_(True)
        run.method.loss("student", run._micro_batches(0)[0], run._roles)["consistency"].backward()
        assert all(p.grad is not None for p in run._roles.modules["student"].parameters())
        assert all(p.grad is None for p in [*run._roles.modules["target"].parameters(), *run.teacher.family.backbone.parameters()])
        run.teacher.family.backbone.requires_grad_(False)


class FlowMap(Denoiser):
    """The state at level 0 of the exact trajectory through x_t."""

    def __init__(self, law: Gaussian) -> None:
        self.law = law
        super().__init__(lambda x_t, t, cond: x_t, law.process, "sample")

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        end = self.process.at_level(torch.zeros(len(x_t), dtype=torch.long))
        return Prediction(x_t, t, self.law.flow_map(x_t, t, end), self.process)


@pytest.mark.parametrize("process", [laws.process(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("distance", ["pseudo_huber", "squared"])
def test_the_exact_flow_map_with_an_exact_step_has_no_loss(
    process: NoiseProcess, distance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the teacher's DDIM step, which is not exact, leaves some; so does another student."""
    law = Gaussian.anisotropic(process, d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    method = LCM(guidance_range=(1.0, 1.0), distance=distance, pairs=200, pair_steps=2, pair_guidance_scale=1.0)  # type: ignore[arg-type]
    with started(method, tmp_path, teacher, batch_size=200) as run:
        other = method.loss("student", run._micro_batches(0)[0], run._roles)["consistency"].item()
        run._roles.denoiser = lambda name, own=run._roles.denoiser: own(name) if name == "teacher" else FlowMap(law)
        batch = run._micro_batches(0)[0]
        batch.draws.normal = lambda name, shape, own=batch.draws.normal: own(name, shape).double()
        by_ddim = method.loss("student", batch, run._roles)["consistency"].item()
        monkeypatch.setattr(_latent, "ddim_step", lambda p, u: law.flow_map(p.x_t, p.t, u))
        exact = method.loss("student", batch, run._roles)["consistency"].item()
    assert abs(exact) < 1e-9
    assert by_ddim > 1e-7
    assert other > 1e-3


def test_the_target_at_level_0_is_the_state_itself(tmp_path: Path) -> None:
    with started(LCM(guidance_range=(1.0, 1.0), distance="squared", **PAIRS), tmp_path) as run:
        shake(run)
        batch = run._micro_batches(0)[0]
        batch.draws.integers = lambda name, low, high, own=batch.draws.integers: own(name, low, high) * (name != "n")
        got = run.method.loss("student", batch, run._roles)["consistency"]
        _, x0, cond = run.method.draw_pairs(batch)
        t = torch.full((4,), 19)
        x_t = run.teacher.process.add_noise(x0, batch.noise("eps"), t)
        x_u = _latent.ddim_step(run._roles.denoiser("teacher")(x_t, t, cond), torch.zeros(4, dtype=torch.long))
        want = (run._roles.denoiser("student")(x_t, t, cond).x0 - x_u).square().mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert want > 1e-4


def test_times_are_the_grid_of_the_sampler_s_own(tmp_path: Path) -> None:
    """``LCMScheduler`` visits times of this grid only."""
    with started(LCM(guidance_range=(1.0, 1.0), **PAIRS), tmp_path, batch_size=400) as run:
        level, lower, end = run.method.neighbours(run._micro_batches(0)[0].draws.integers("n", 0, 50))
    assert (end == 0).all()
    assert sorted(set(level.tolist())) == list(range(19, 1000, 20))
    assert torch.equal(lower, torch.where(level == 19, 0, level - 20))
    assert set(LCM().levels()) == {999, 759, 499, 259}
    assert LCM(steps=50).levels() == list(range(999, 0, -20))


# --- the target


def test_the_target_follows_accepted_updates_only(tmp_path: Path) -> None:
    method = LCM(decay=0.75, **PAIRS)
    with started(method, tmp_path, warmup_steps=0) as run:
        shake(run)
        target = run._roles.parameters("target")
        for broken in (False, True, False):
            before = [p.clone() for p in target]
            method.huber_c = float("nan") if broken else 1e-3
            run.advance()
            for old, leader, now in zip(before, run._roles.parameters("student"), target, strict=True):
                want = old if broken else 0.75 * old + 0.25 * leader
                assert torch.allclose(now, want, atol=1e-7)
                assert broken or not torch.equal(now, old)


# --- the range


def test_a_range_of_scales_is_refused_where_the_student_cannot_be_told_which(tmp_path: Path) -> None:
    teacher = Teacher.from_module(nn.Linear(2, 2), RectifiedFlow(), "flow_prediction", shape=(2,), name="mine")
    with pytest.raises(UserError, match=r"mine: Module has no network.*equal ends"):
        Trainer(LCM(), teacher, output_dir=tmp_path)
    Trainer(LCM(guidance_range=(3.0, 3.0)), teacher, output_dir=tmp_path)


def test_one_scale_needs_no_embedding_and_the_teacher_is_asked_at_it(tmp_path: Path) -> None:
    method = LCM(guidance_range=(3.0, 3.0), **PAIRS)
    assert method.schedule(tiny_teacher()).guidance_scale is None
    with started(method, tmp_path) as run:
        assert run._roles.modules["student"].config.time_cond_proj_dim is None
        assert method.teacher_guidance() == 3.0


def test_the_student_samples_at_the_middle_of_its_range_unless_told(tmp_path: Path) -> None:
    assert LCM().sample_scale == 11.0
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        seen.append(cond["guidance_scale"])
        return x_t

    denoiser = Denoiser(network, laws.process(), "epsilon")
    LCM(sample_guidance_scale=7.0, steps=1).sample(denoiser, noise, torch.zeros(2, 1))
    assert [scale.tolist() for scale in seen] == [[7.0, 7.0]]


def test_a_plan_counts_scales_that_have_no_values(tmp_path: Path) -> None:
    """Whether every drawn scale is 1, when the null pass is left out, cannot be asked there."""
    config = Config(output_dir=tmp_path, batch_size=2)
    found = plan(LCM(**PAIRS), Teacher.planned("fashion"), config, prompts=["a red boot"])
    assert found.unknown == found.refusals == []
    assert (found.updates["student"].activations or 0) > 0
    assert (found.roles["target"].train, found.roles["target"].trainable) == ("average", 0)
    assert found.roles["student"].parameters > found.roles["teacher"].parameters


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_range": (4.0, 2.0)},
        {"guidance_range": (0.0, 2.0)},
        {"sample_guidance_scale": 5.0},
        {"steps": 0},
        {"steps": 51},
        {"original_steps": 1001},
        {"distance": "l1"},
        {"huber_c": 0.0},
        {"lr": 0.0},
        {"decay": 1.0},
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        LCM(**fields)  # type: ignore[arg-type]
