"""The exported folder: one call, stock classes, and a proof that can fail."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline, tiny_teacher

from fastdiff.diffusion.solvers import lcm_times
from fastdiff.errors import UserError
from fastdiff.eval.cost import count_calls
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.models.condition import with_guidance
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.guidance_embedding import with_guidance_embedding
from fastdiff.models.teacher import load_pipeline
from fastdiff.pipelines.export import Exported, Schedule, export_pipeline, verify_export, verify_exports
from fastdiff.pipelines.few_step import own_call
from fastdiff.pipelines.one_step import one_step_scheduler, without_guidance
from fastdiff.trainers.method import one_step
from fastdiff.trainers.trajectory import trajectory

ONE = Schedule([999], "ddim")
NOTE = {"method": "test"}


@pytest.mark.parametrize("timestep", [399, 999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_time_for_every_number_of_steps_up_to_fifty(timestep: int, prediction_type: str) -> None:
    alpha_bar = 0.00466 if timestep == 999 else 0.3
    scheduler = one_step_scheduler(alpha_bar, timestep=timestep, prediction_type=prediction_type)
    for n in range(1, 51):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == [timestep]
    assert abs(scheduler.alphas_cumprod[timestep].double() / alpha_bar - 1) < 1e-6
    a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x, out = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x0 = (x - s * out) / a if prediction_type == "epsilon" else a * x - s * out
    got = scheduler.step(out, timestep, x).prev_sample
    assert (got - x0).abs().max() < 1e-5 * x0.abs().max()


def test_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_bar"):
        one_step_scheduler(0.0)


def test_a_zero_guidance_embedding_changes_no_bit() -> None:
    unet = tiny_pipeline().unet
    student = without_guidance(unet)
    x, t, c = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 16, unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = unet(x, t, c).sample
        for scale in (0.0, 7.5):
            embedded = student(x, t, c, timestep_cond=torch.full((3, 4), scale)).sample
            assert torch.equal(plain, embedded)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object, object]:
    folder, teacher = tmp_path_factory.mktemp("student"), tiny_teacher()
    pipeline = export_pipeline(teacher, teacher.family.backbone, folder, ONE, note=NOTE, prompt="a red boot on a white background")
    return folder, teacher, pipeline


def test_the_bare_call_is_one_network_call_of_batch_one(exported: tuple[Path, object, object]) -> None:
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    for load in (DiffusionPipeline, AutoPipelineForText2Image):
        pipeline = load.from_pretrained(exported[0], use_safetensors=True)
        assert type(pipeline).__name__ == "StableDiffusionPipeline"
        pipeline.set_progress_bar_config(disable=True)
        calls: list[int] = []
        pipeline.unet.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(inputs[0])))
        image = pipeline("a red boot on a white background").images[0]
        assert calls == [1]
        assert image.size == (32, 32)


def test_the_folder_says_what_it_is(exported: tuple[Path, object, object]) -> None:
    from diffusers import LCMScheduler

    folder = exported[0]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((folder / "fastdiff.json").read_text()) == NOTE
    assert (folder / "tokenizer" / "merges.txt").exists()
    lcm = LCMScheduler.from_pretrained(folder, subfolder="scheduler_lcm")
    lcm.set_timesteps(1)
    assert lcm.timesteps.tolist() == [999]
    assert not list(folder.glob(".export*"))


def test_the_child_process_reproduces_the_samples_and_notices_other_weights(exported: tuple[Path, object, object]) -> None:
    folder, teacher, _ = exported
    prompts = ["a red boot on a white background", "a blue bag on a black background"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    student = Denoiser(teacher.denoiser.network, teacher.process, teacher.prediction_type)
    with torch.no_grad():
        expected = teacher.decode(one_step(student, noise, teacher.encode(prompts)))
    assert verify_export(folder, ONE, prompts, noise, expected) < 1e-5
    with pytest.raises(RuntimeError, match="differs from the trainer"):
        verify_export(folder, ONE, prompts, noise, (expected + 1e-3).clamp(0, 1))


def test_a_full_disk_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(teacher.pipeline), "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        export_pipeline(teacher, teacher.family.backbone, tmp_path, ONE, note=NOTE, prompt="x")
    assert list(tmp_path.iterdir()) == []


def test_teachers_whose_student_could_not_be_saved_are_refused_before_the_training(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    from fastdiff import Trainer
    from fastdiff.models.teacher import Teacher
    from fastdiff.trainers import ODEPairs

    dark = tiny_pipeline(prediction_type="v_prediction")
    dark.scheduler = DDIMScheduler.from_config(dark.scheduler.config, rescale_betas_zero_snr=True)
    guided = tiny_pipeline()
    guided.unet = without_guidance(guided.unet)
    for pipeline, reason in ((dark, "no signal"), (guided, "time_cond_proj_dim")):
        with pytest.raises(UserError, match=reason):
            Trainer(ODEPairs(), Teacher(pipeline, name="fashion"), output_dir=tmp_path)


TIMES = [[999], [999, 499], [999, 749, 499, 249], [899, 674, 449, 224], [999 - 125 * k for k in range(8)]]


def test_no_lcm_scheduler_begins_below_the_last_time() -> None:
    with pytest.raises(ValueError, match="visits"):
        Schedule(TIMES[3], "consistency").parts(tiny_teacher())


@pytest.mark.parametrize("sampler", ["ddim", "consistency"])
def test_few_step_folders_repeat_the_trainer_in_as_many_calls(sampler: str, tmp_path: Path) -> None:
    """The bare call, but for LCM folders of another number of steps than their pipeline's own 4."""
    grids = [times for times in TIMES if sampler == "ddim" or times[0] == 999]
    exported = [few_step_folder(times, sampler, tmp_path / str(i)) for i, times in enumerate(grids)]
    assert max(verify_exports(exported)) < 1e-5


def few_step_folder(times: list[int], sampler: str, folder: Path) -> Exported:
    """A teacher's own network as such a student, and the images that it must make."""
    teacher, schedule = tiny_teacher(prediction_type="v_prediction"), Schedule(times, sampler)
    assert bool(schedule.call) == (sampler == "consistency" and len(times) in {2, 8})
    pipeline = export_pipeline(teacher, teacher.family.backbone, folder, schedule, note=NOTE, prompt="x")
    assert own_call(pipeline) == schedule.call
    with count_calls(pipeline.unet) as calls:  # what sampling and evaluation do
        pipeline_subject("student", pipeline).generate(["x"], [torch.Generator().manual_seed(0)])
    assert calls.forwards == 2 * len(times)  # one image by the probe
    prompts = ["a red boot on a white background", "a blue bag on a black background"]
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        x = trajectory(teacher.denoiser, noise, teacher.encode(prompts), times, sampler, draws)[-1].x0  # type: ignore[arg-type]
        other = one_step(teacher.denoiser, noise, teacher.encode(prompts))
    if len(times) > 1:
        assert (teacher.decode(other) - teacher.decode(x)).abs().max() > 1e-4
    return Exported(folder, schedule, prompts, noise, teacher.decode(x))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_student_that_is_told_its_guidance_gets_it_from_its_folder(steps: int, tmp_path: Path) -> None:
    """In verification, sampling and evaluation; a bare call runs at its class's own scale and is another picture."""
    teacher = tiny_teacher()
    network = with_guidance_embedding(teacher.family.backbone)
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    schedule = Schedule(lcm_times(steps), "consistency", original_steps=50, guidance_scale=11.3)
    assert schedule.call == {"guidance_scale": 11.3} | ({"num_inference_steps": 3} if steps == 3 else {})
    note = NOTE | {"call": schedule.call}
    pipeline = export_pipeline(teacher, network, tmp_path, schedule, note=note, prompt="x")
    assert own_call(pipeline) == schedule.call
    assert "guidance_scale=11.3" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256
    prompts = ["a red boot on a white background"]
    noise = torch.stack([torch.randn(teacher.latent_shape, generator=torch.Generator().manual_seed(0))])
    student = Denoiser(teacher.family.network(network), teacher.process, teacher.prediction_type)

    def expected(scale: float) -> torch.Tensor:
        draws = torch.Generator().manual_seed(0)
        torch.randn(teacher.latent_shape, generator=draws)
        cond = with_guidance(teacher.encode(prompts), torch.tensor([scale], dtype=torch.float64))
        with torch.no_grad():
            return teacher.decode(trajectory(student, noise, cond, lcm_times(steps), "consistency", [draws])[-1].x0)

    loaded = load_pipeline(tmp_path)
    assert own_call(loaded) == schedule.call
    subject = pipeline_subject("student", loaded)
    assert (subject.steps, subject.guidance_scale) == (steps, 11.3)
    images = subject.generate(prompts, [torch.Generator().manual_seed(0)])
    assert (images - expected(11.3)).abs().max() < 1e-5
    assert (images - expected(8.5)).abs().max() > 1e-3
    other = pipeline_subject("student", loaded, guidance_scale=8.5).generate(prompts, [torch.Generator().manual_seed(0)])
    assert (other - expected(8.5)).abs().max() < 1e-5
