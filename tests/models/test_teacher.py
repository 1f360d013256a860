"""Teachers: what they say is what their pipeline says, and what cannot work is refused with its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import tiny_pipeline, tiny_teacher

from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher

PROMPTS = ["a red boot on a white background", "a bag"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("teachers") / "tiny"
    tiny_pipeline().save_pretrained(target)
    return target


def broken(folder: Path, target: Path, edit: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, target)
    edit(target)
    return target


def cut(path: str, keep: float) -> Callable[[Path], None]:
    """An edit that leaves the first part of a file, like a download that stopped."""

    def edit(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(keep * len(data))])

    return edit


def reindexed(**entries: object) -> Callable[[Path], None]:
    """An edit of model_index.json."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))

    return edit


# --- what it says


def test_loaded_teacher_computes_what_was_saved(folder: Path) -> None:
    loaded, built = Teacher.from_pretrained(folder), tiny_teacher()
    assert loaded.name == "tiny"
    assert loaded.weights_hash() == built.weights_hash()
    x = torch.randn(2, *loaded.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300, 999])
    assert torch.equal(loaded.encode(PROMPTS), built.encode(PROMPTS))
    assert torch.equal(loaded.denoiser(x, t, loaded.encode(PROMPTS)).x0, built.denoiser(x, t, built.encode(PROMPTS)).x0)
    assert torch.equal(loaded.decode(x), built.decode(x))
    assert str(Teacher.from_pretrained(str(folder)).name) == "tiny"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_step_is_that_of_the_pipeline(prediction_type: str) -> None:
    """Prompt to text states, network, conversion, scaling factor and decoder at once, against diffusers' own call."""
    teacher = tiny_teacher(prediction_type=prediction_type)
    scheduler = type(teacher.pipeline.scheduler).from_config(teacher.pipeline.scheduler.config, set_alpha_to_one=True)
    teacher.pipeline.scheduler = scheduler
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    call = {"latents": z, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    want = teacher.pipeline(PROMPTS, **call).images
    x0 = teacher.denoiser(z, torch.tensor([999, 999]), teacher.encode(PROMPTS)).x0
    images = teacher.decode(x0)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, want, rtol=0, atol=1e-5)
    assert images.std() > 0.01


def test_null_is_the_empty_prompt(folder: Path) -> None:
    teacher = tiny_teacher()
    assert torch.equal(teacher.null, teacher.encode([""]))
    assert not torch.allclose(teacher.null, teacher.encode(["a bag"]))


def test_null_follows_the_pipeline_to_another_dtype_or_device() -> None:
    """Asked for before Trainer moves the pipeline, a remembered null stays behind on the old device."""
    teacher = tiny_teacher()
    assert teacher.null.dtype == torch.float32
    teacher.pipeline.to(torch.float64)
    assert teacher.null.dtype == teacher.encode([""]).dtype == torch.float64


def test_identity_sees_every_part_and_not_the_adapters() -> None:
    """Stored pairs and checkpoints depend on the text encoder, the decoder and the schedule as much as on the network."""
    teacher = tiny_teacher()
    same = teacher.identity()
    assert tiny_teacher().identity() == same
    roles = Roles(teacher, {"fake_score": Role(train="lora", lr=1e-3, rank=2)})
    for parameter in roles.parameters("fake_score"):
        parameter.data += 1
    assert teacher.identity() == same
    roles.close()
    for part in ("unet", "text_encoder", "vae"):
        other = tiny_teacher()
        next(getattr(other.pipeline, part).parameters()).data.view(-1)[0] += 1e-3
        assert other.identity() != same, part
    assert tiny_teacher(prediction_type="v_prediction").identity() != same
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.0121)
    assert Teacher(pipeline).identity() != same


def test_everything_is_frozen_and_dropout_is_off() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.train().requires_grad_(True)
    pipeline.vae.train()
    teacher = Teacher(pipeline)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not any(module.training for module in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    assert not teacher.encode(["a bag"]).requires_grad


def test_encode_knows_the_order_of_its_prompts() -> None:
    teacher = tiny_teacher()
    both = teacher.encode(PROMPTS)
    torch.testing.assert_close(both[1:], teacher.encode(PROMPTS[1:]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[0], both[1])


def test_long_prompts_are_cut_as_the_pipeline_does() -> None:
    teacher = tiny_teacher()
    text = "a red boot on a white background " * 5
    want = teacher.pipeline.encode_prompt([text], torch.device("cpu"), 1, False)[0]
    assert torch.equal(teacher.encode([text]), want)
    assert want.shape == (1, 16, 32)


def test_process_and_prediction_type_come_from_the_scheduler() -> None:
    teacher = tiny_teacher(prediction_type="v_prediction")
    assert teacher.prediction_type == teacher.denoiser.prediction_type == "v_prediction"
    table = teacher.pipeline.scheduler.alphas_cumprod.double()
    assert (teacher.process.alpha(torch.arange(1000)).square() - table).abs().max() < 1e-12
    assert teacher.latent_shape == (4, 8, 8)


def test_images_are_clamped_and_scaled() -> None:
    """decode(z) is vae(z / scaling_factor) / 2 + 1/2, cut to [0, 1]."""
    teacher = tiny_teacher()
    z = 30 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = teacher.pipeline.vae.decode(z / teacher.pipeline.vae.config.scaling_factor).sample
    images = teacher.decode(z)
    torch.testing.assert_close(images, ((raw + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


def test_half_precision_weights_take_float32_latents(folder: Path) -> None:
    """Noise and states are float32 everywhere: a teacher loaded with dtype= must accept them."""
    teacher = Teacher.from_pretrained(folder, dtype=torch.bfloat16)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    got, want = (each.denoiser(x, t, each.encode(PROMPTS)).x0 for each in (teacher, tiny_teacher()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


# --- what it refuses


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"no folder {name}.*fashion"):
        Teacher.from_pretrained(name)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}.*model_index.json"):
        Teacher.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        cut("unet/diffusion_pytorch_model.safetensors", 0.5),
        cut("unet/diffusion_pytorch_model.safetensors", 0.0),
        cut("vae/diffusion_pytorch_model.safetensors", 0.5),
        cut("text_encoder/model.safetensors", 0.5),
        cut("unet/config.json", 0.5),
        cut("model_index.json", 0.5),
        lambda folder: shutil.rmtree(folder / "unet"),
        reindexed(_class_name="NoSuchPipeline"),
        lambda folder: (folder / "model_index.json").write_text("{}"),
    ],
    ids=["unet", "empty unet", "vae", "text", "config", "index", "no unet", "unknown class", "index without class"],
)
def test_a_damaged_folder_is_one_line_with_its_name(folder: Path, tmp_path: Path, edit: Callable[[Path], None]) -> None:
    target = broken(folder, tmp_path / "damaged", edit)
    with pytest.raises(UserError, match=str(target)) as caught:
        Teacher.from_pretrained(target)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_replaced_by_random_ones(folder: Path, tmp_path: Path) -> None:
    """diffusers only logs a warning; what comes after it must still be one line with the name."""
    from safetensors.torch import load_file, save_file

    def edit(folder: Path) -> None:
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if not k.startswith("mid_block")}, path)

    target = broken(folder, tmp_path / "holes", edit)
    with pytest.raises(UserError, match=str(target)):
        Teacher.from_pretrained(target)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file

        path = folder / "unet/diffusion_pytorch_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()

    target = broken(folder, tmp_path / "pickled", edit)
    with pytest.raises(UserError, match=str(target)):
        Teacher.from_pretrained(target)


def test_another_pipeline_class_is_refused_by_name() -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )

    class Unheard(DDPMPipeline):
        pass

    with pytest.raises(UserError, match=r"Unheard.*StableDiffusionPipeline"):
        Teacher(Unheard(unet, DDPMScheduler()))


def test_a_flow_scheduler_in_a_known_pipeline_is_a_mistake_of_the_user() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="no variance-preserving process"):
        Teacher(pipeline)


def test_epsilon_prediction_without_signal_at_the_end_is_refused() -> None:
    """With zero terminal SNR alpha(999) = 0: one step from pure noise divides by zero, and every sample is inf."""
    pipeline = tiny_pipeline()
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    pipeline.scheduler = scheduler
    with pytest.raises(UserError, match="epsilon"):
        Teacher(pipeline)
