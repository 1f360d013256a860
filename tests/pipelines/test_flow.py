"""Students of flow teachers: stock schedulers at exactly their times, and folders that plain diffusers draws the same from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from short_runs import run_to, trainer
from tiny import tiny_flow_teacher, tiny_teacher

from fastdiff.cli.sample import check_student
from fastdiff.diffusion.times import shift_time
from fastdiff.errors import UserError
from fastdiff.eval.cost import count_calls
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.pipelines.export import Schedule, export_pipeline
from fastdiff.pipelines.few_step import own_call
from fastdiff.pipelines.flow import FlowSchedule, flow_scheduler, schedule_of
from fastdiff.trainers import DMD2, TDM, ODEPairs
from fastdiff.trainers.trajectory import trajectory

SIZE = {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 32}
PROMPTS = ["a red boot on a white background", "a blue bag on a black background"]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25])
def test_a_shifted_even_grid_is_a_setting_of_the_scheduler(steps: int, shift: float) -> None:
    """What a bare ``set_timesteps(K)`` makes of the saved settings, to the rounding of float32."""
    times = shift_time(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift)
    scheduler = flow_scheduler(times.tolist())
    again = type(scheduler).from_config(json.loads(scheduler.to_json_string()))
    again.set_timesteps(steps)
    assert (again.timesteps.double() - 1000 * times).abs().max() < 1e-4
    assert again.sigmas[-1] == 0


def test_three_times_are_always_a_setting_and_four_of_any_kind_are_not() -> None:
    assert torch.allclose(flow_scheduler([1.0, 0.4, 0.3]).timesteps, torch.tensor([1000.0, 400.0, 300.0]))
    assert torch.allclose(flow_scheduler([1.0, 0.9, 0.1]).timesteps, torch.tensor([1000.0, 900.0, 100.0]))
    for times in ([0.9, 0.6, 0.3], [1.0, 0.9, 0.2, 0.1], [1.0, 1.0, 0.5]):
        with pytest.raises(ValueError, match="begin at 1, pure noise"):
            flow_scheduler(times)


def test_the_process_decides_the_schedule() -> None:
    assert schedule_of(tiny_flow_teacher(), [1.0], "ddim") == FlowSchedule([1.0], "ddim", size=SIZE)
    assert schedule_of(tiny_teacher(), [999], "ddim") == Schedule([999], "ddim")


@pytest.mark.parametrize(("times", "sampler"), [([1.0, 0.9, 0.75, 0.5], "ddim"), ([1.0, 0.5], "consistency")])
def test_a_folder_repeats_the_trainer_in_as_many_calls(times: list[float], sampler: str, tmp_path: Path) -> None:
    teacher = tiny_flow_teacher(shift=3.0)
    schedule = schedule_of(teacher, times, sampler)
    note = {"method": "test", "num_inference_steps": len(times), "call": schedule.call}
    pipeline = export_pipeline(teacher, teacher.family.backbone, tmp_path, schedule, note=note, prompt="x")
    call = {"num_inference_steps": len(times), "guidance_scale": 1.0, **SIZE}
    assert own_call(pipeline) == schedule.call == call
    words = ", ".join(f"{key}={value}" for key, value in call.items())
    assert f'("x", {words}).images[0]' in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SanaPipeline"
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    with count_calls(pipeline.transformer) as calls:  # what sampling and evaluation do
        subject = pipeline_subject("student", pipeline)
        subject.generate(["x"], [torch.Generator().manual_seed(0)])
    assert (calls.forwards, calls.samples) == (2 * len(times), 2 * len(times))  # one image by the probe
    assert (subject.guidance_scale, subject.steps, subject.resolution) == (1.0, len(times), (32, 32))
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    levels = [round(1000 * time) - 1 for time in times]
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        x = trajectory(teacher.denoiser, noise, teacher.encode(PROMPTS), levels, sampler, draws)[-1].x0  # type: ignore[arg-type]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert own_call(loaded) == call
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    images = loaded(PROMPTS, latents=noise, generator=draws, output_type="pt", **call).images
    assert (images - teacher.decode(x)).abs().max() < 1e-5


STUDENTS: dict[str, Any] = {
    "one step": ODEPairs(pairs=8, pair_steps=2),
    "deterministic": TDM(start=1000),
    "stochastic": DMD2(steps=4, gan_weight=1e-3, pairs=8, pair_steps=2),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_trained_students_are_verified_and_called_as_they_were_trained(name: str, tmp_path: Path) -> None:
    """Training, merging, export and the child process that cannot import fastdiff; the run fails where they differ."""
    run = trainer(STUDENTS[name], tmp_path, tiny_flow_teacher(), max_steps=2)
    pipeline = run.train()
    steps = 1 if name == "one step" else 4
    assert run.result["export_max_abs_diff"] < 1e-5
    assert own_call(pipeline) == {"num_inference_steps": steps, "guidance_scale": 1.0, **SIZE}
    assert pipeline.scheduler.config.stochastic_sampling == (name == "stochastic")
    check_student(str(tmp_path), steps)
    with pytest.raises(UserError, match="leave --steps out"):
        check_student(str(tmp_path), 8)
    check_student(str(tmp_path), None, 1.0)
    with pytest.raises(UserError, match=r"--guidance-scale 7\.5"):
        check_student(str(tmp_path), None, 7.5)


def test_times_that_no_scheduler_visits_are_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begin at 1, pure noise"):
        FlowSchedule([0.9, 0.45], "ddim").parts(tiny_flow_teacher())
    with pytest.raises(UserError, match="start=1000"):  # the method's own reason, with its way out, comes first
        run_to(TDM(), tmp_path, 1, teacher=tiny_flow_teacher())  # from level 899
