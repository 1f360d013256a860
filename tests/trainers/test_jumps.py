"""What MeanFlow, shortcut models and CTM share: places, the told duration, the jump, who is refused, and the exported folder."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from exact_jumps import LAW, ExactJump
from short_runs import started, trainer
from tiny import tiny_flow_teacher, tiny_teacher
from torch import nn

from fastdiff import Trainer
from fastdiff.diffusion.matching import match_state
from fastdiff.diffusion.process import EDM, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.models.guidance_embedding import embed_guidance, rebased
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import CTM, MeanFlow, Shortcut
from fastdiff.trainers._jumps import FLOW, UNIT, Places, jump, told
from fastdiff.trainers.method import Method

ALL = [laws.process(), RectifiedFlow(), EDM(), TrigFlow()]
each_process = pytest.mark.parametrize("process", ALL, ids=lambda p: type(p).__name__)
FEW = {"pairs": 8, "pair_steps": 2}
METHODS: list[Method] = [MeanFlow(**FEW), Shortcut(**FEW), CTM(**FEW)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name())


# --- places


@each_process
def test_places_are_the_levels_counted_from_the_end(process: NoiseProcess) -> None:
    places = Places(process)
    levels = torch.tensor([0, 249, 499, 999], dtype=torch.float64)
    view = process.continuous() if isinstance(process, DiscreteVP) else process
    t = FLOW.t_from_nsr(view.nsr(view.at_level(levels)))
    assert torch.allclose(places.of(t), (levels + 1) / 1000, atol=1e-12)
    assert torch.allclose(view.level(view.at_level(levels - 0.25 * (levels > 0))), levels - 0.25 * (levels > 0), atol=1e-9)


@each_process
def test_places_and_flow_times_are_inverse_down_to_the_end(process: NoiseProcess) -> None:
    places = Places(process)
    p = torch.linspace(0, 1, 2001, dtype=torch.float64)
    t = places.time(p)
    assert t[0] == 0
    assert (t.diff() > 0).all()
    assert (places.of(t) - p).abs().max() < 1e-12


# --- the jump


@each_process
def test_the_jump_is_the_ddim_step_of_the_told_x0(process: NoiseProcess) -> None:
    view = process.continuous() if isinstance(process, DiscreteVP) else process
    t, r = (view.at_level(torch.full((3,), level, dtype=torch.float64)) for level in (700.0, 300.0))
    x_t = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = ExactJump(view)(x_t, t, told(None, torch.full((3,), 0.4, dtype=torch.float64)))
    x, s = match_state(x_t, t, view, FLOW)
    end, s_r = match_state(ddim_step(prediction, r), r, view, FLOW)
    u = (x - prediction.x0) / s[:, None]
    assert torch.allclose(jump(x, s, s_r, u), end, atol=1e-10)
    assert torch.allclose(ddim_step(prediction, r), LAW.under(view).flow_map(x_t, t, r), atol=1e-9)
    assert torch.equal(jump(x, s, s, u), x)


@each_process
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_of_exact_jumps_samples_the_exact_flow_map(process: NoiseProcess, steps: int) -> None:
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = LAW.under(process)
    start = process.initial_scale * noise
    with torch.no_grad():
        got = Shortcut(steps=steps).sample(ExactJump(process), noise, None)
    want = law.consistency(start, process.at_level(torch.tensor(999)).expand(5))
    assert torch.allclose(got, want, atol=1e-8)


# --- the told duration


def test_what_is_told_moves_no_faster_than_the_duration_does() -> None:
    """1000 times the duration, as a time embedding has it, would make MeanFlow's derivative a thousand times as large."""
    d = torch.linspace(0, 1, 1001, dtype=torch.float64)
    features = embed_guidance(1 + UNIT * d, 256)
    speed = (features.diff(dim=0) / d.diff()[:, None]).abs().max()
    assert 3.9 < speed < 4.1
    assert (features[-1] - features[0]).abs().max() > 0.9


def test_a_pipelines_default_scale_becomes_the_told_one_and_others_keep_their_distance() -> None:
    teacher = tiny_teacher()
    network = teacher.family.guidance_embedding()(teacher.family.backbone)
    generator = torch.Generator().manual_seed(0)
    weight = network.time_embedding.cond_proj.weight
    weight.data = torch.randn(weight.shape, generator=generator)
    other = rebased(network, 1 + UNIT / 4, 7.5)
    for x, tolerance in ((0.0, 1e-5), (0.003, 5e-3)):
        want, got = (
            net.time_embedding.cond_proj(embed_guidance(torch.tensor([s + x], dtype=torch.float64), 256))
            for net, s in ((network, 1 + UNIT / 4), (other, 7.5))
        )
        assert (got - want).norm() < tolerance * want.norm()
    assert not torch.equal(other.time_embedding.cond_proj.weight, weight)


def test_a_bare_call_and_another_number_of_steps_repeat_the_students_samples(tmp_path: Path) -> None:
    """Of one folder: 2 steps by a bare call, and 4 by the card's formula under diffusers' plain DDIM scheduler."""
    method = Shortcut(**FEW, steps=2)
    run = trainer(method, tmp_path, max_steps=2, warmup_steps=0)
    pipeline = run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    assert type(pipeline) is StableDiffusionPipeline
    assert "guidance_scale=7.5 + 0.004 * (1 / K - 0.5)" in (tmp_path / "README.md").read_text(encoding="utf-8")
    with started(method, tmp_path / "again", warmup_steps=0) as again:
        again.advance()
        again.advance()
        student = again._roles.denoiser("student")
        prompts, noise, _ = run.samples
        with torch.no_grad():
            for p in again._roles.parameters("student"):
                p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            want, far = (
                again.teacher.decode(dataclasses.replace(method, steps=k).sample(student, noise, again.teacher.encode(prompts)))
                for k in (4, 2)
            )
            schedule = dataclasses.replace(method, steps=2).schedule(again.teacher)
            pipeline.unet = schedule.components(again._roles.modules["student"])["unet"]
            from fastdiff.pipelines.few_step import ddim_scheduler

            pipeline.scheduler = ddim_scheduler(again.teacher.process.alphas_cumprod, [999, 749, 499, 249], "epsilon")
            assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
            got = pipeline(prompts, latents=noise, guidance_scale=7.5 + 0.004 * (1 / 4 - 0.5), output_type="pt").images
    assert (got - want).abs().max() < 1e-4
    assert (far - want).abs().max() > 1e-3


# --- who is refused


@each_method
def test_sana_and_modules_that_cannot_be_told_are_refused_with_the_reason(method: Method, tmp_path: Path) -> None:
    plain = Teacher.from_module(nn.Linear(2, 2), RectifiedFlow(), "flow_prediction", shape=(2,), name="mine")
    for teacher in (plain, tiny_flow_teacher()):
        with pytest.raises(UserError, match=f"{teacher.name}.*the mean of all jumps"):
            Trainer(method, teacher, prompts=["0"], output_dir=tmp_path)


@each_method
def test_settings_that_cannot_work_are_refused(method: Method) -> None:
    for fields in ({"steps": 0}, {"steps": 51}, {"lr": 0.0}):
        with pytest.raises(UserError, match=next(iter(fields))):
            type(method)(**fields)


def test_a_table_whose_last_time_has_no_signal_is_refused() -> None:
    table = torch.cat([laws.process().alphas_cumprod[:-1], torch.zeros(1, dtype=torch.float64)])
    teacher = Teacher.from_module(TimeMLP(2), DiscreteVP(table), "v_prediction", shape=(2,), name="dark")
    with pytest.raises(UserError, match="the last time of dark has no signal"):
        Shortcut().validate(teacher)
