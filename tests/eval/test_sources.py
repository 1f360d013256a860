"""Every kind of source becomes a subject whose images are those that plain diffusers makes of it."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.data.fashion import random_captions
from fastdiff.errors import UserError
from fastdiff.eval.cost import size_mb
from fastdiff.eval.evaluate import evaluate
from fastdiff.eval.generate import generate
from fastdiff.eval.noise import generators
from fastdiff.eval.sources import image_folder, local_folder, lora_file, open_pipeline, open_source
from fastdiff.models.teacher import BUNDLED

PROMPTS = random_captions(3, 0)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    teacher.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> Path:
    """An adapter of rank 2 with random weights, as diffusers saves one."""
    unet = DiffusionPipeline.from_pretrained(base, use_safetensors=True).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    torch.manual_seed(0)
    state = {k: 0.3 * torch.randn_like(v) for k, v in get_peft_model_state_dict(unet).items()}
    folder = tmp_path_factory.mktemp("lora") / "style"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def images(subject) -> Tensor:
    return subject.draw(PROMPTS, seed=0, indices=range(3))


def own(pipeline, **options) -> Tensor:
    """What diffusers makes of the same prompts and generators."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=generators(0, range(3)), output_type="pt", **options).images


def test_a_diffusers_folder(base, teacher):
    subject = open_source(base, steps=2, guidance_scale=3.0)
    assert (subject.name, subject.steps, subject.guidance_scale) == ("base (2 steps)", 2, 3.0)
    torch.testing.assert_close(images(subject), own(teacher, num_inference_steps=2, guidance_scale=3.0), rtol=0, atol=1e-6)
    assert subject.sizes()["size_mb"] == sum(f.stat().st_size for f in base.rglob("*") if f.is_file()) / 1e6


def test_a_student_folder_is_called_bare(student, tmp_path):
    student.save_pretrained(tmp_path / "one")
    subject = open_source(str(tmp_path / "one"), name="mine")
    assert (subject.name, subject.steps, subject.guidance_scale) == ("mine (1 step)", 1, 1.0)
    torch.testing.assert_close(images(subject), own(student), rtol=0, atol=1e-6)


def test_the_bundled_teacher_in_another_dtype():
    subject = open_source("fashion", steps=1, guidance_scale=1.0, dtype=torch.bfloat16)
    assert next(subject.network.parameters()).dtype == torch.bfloat16
    assert subject.sizes()["size_mb"] == size_mb(BUNDLED["fashion"])
    exact = open_source("fashion", steps=1, guidance_scale=1.0)
    assert subject.identity() != exact.identity()
    other = exact.draw(PROMPTS, seed=1, indices=range(3))
    away, elsewhere = ((images(subject) - x).abs().mean() for x in (images(exact), other))
    assert 0 < away < elsewhere / 2  # the same noise, whatever the dtype


def test_a_hub_id_from_the_cache(base, teacher, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit, cache = "0" * 40, tmp_path / "models--owner--tiny"
    shutil.copytree(base, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    subject = open_source("owner/tiny", steps=1, guidance_scale=1.0)
    assert subject.name == "tiny (1 step)"
    assert subject.sizes()["size_mb"] == size_mb(base)
    torch.testing.assert_close(images(subject), own(teacher, num_inference_steps=1, guidance_scale=1.0), rtol=0, atol=1e-6)
    assert local_folder("owner/other") is None


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_lora_adds_its_product_to_the_weights_fused_or_not(scale, base, lora):
    options = {"steps": 2, "guidance_scale": 2.0}
    plain = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    state, weights = load_file(lora_file(lora)), dict(plain.unet.named_parameters())
    for key in [k for k in state if k.endswith("lora_A.weight")]:
        target = key.removeprefix("unet.").replace("lora_A.", "")
        weights[target].data += scale * state[key.replace("lora_A", "lora_B")] @ state[key]
    expected = own(plain, num_inference_steps=2, guidance_scale=2.0)
    beside, fused = (open_source(base, lora=lora, lora_scale=scale, fuse=fuse, **options) for fuse in (False, True))
    for subject in (beside, fused):
        torch.testing.assert_close(images(subject), expected, rtol=0, atol=1e-5)
    bare = open_source(base, **options)
    assert (images(bare) - expected).abs().max() > 1e-3
    assert len({subject.identity() for subject in (bare, beside, fused)}) == 3
    adapter = sum(value.numel() for value in state.values()) / 1e6
    assert fused.sizes()["parameters_m"] == bare.sizes()["parameters_m"]
    assert beside.sizes()["parameters_m"] == pytest.approx(bare.sizes()["parameters_m"] + adapter)
    assert beside.sizes()["size_mb"] == size_mb(base, lora)
    assert beside.name == "base + style (2 steps)"


def test_the_strength_of_an_adapter_belongs_to_its_identity(base, lora):
    found = {open_source(base, lora=lora, lora_scale=scale, steps=1).identity() for scale in (0.5, 1.0)}
    assert len(found) == 2


def test_a_lora_may_be_any_one_file(lora, tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "style-v2.safetensors"
    shutil.copy(lora_file(lora), file)
    assert lora_file(file) == lora_file(tmp_path / "a") == file
    save_file({}, tmp_path / "a" / "other.safetensors")
    with pytest.raises(UserError, match=r"has other\.safetensors, style-v2\.safetensors: pass the file"):
        lora_file(tmp_path / "a")
    for wrong in (tmp_path, tmp_path / "nowhere", tmp_path / "weights.bin"):
        with pytest.raises(UserError, match="no safetensors file and no folder with one"):
            lora_file(wrong)


def test_a_lora_of_another_network_is_refused(base, lora, tmp_path):
    state = load_file(lora_file(lora))
    save_file({k: torch.zeros(v.shape[0] + 1, v.shape[1] + 1) for k, v in state.items()}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="does not fit a StableDiffusionPipeline"):
        open_pipeline(base, lora=tmp_path / "wide.safetensors")
    save_file({k.replace("unet.", "transformer."): v for k, v in state.items()}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="trained for another one"):
        open_pipeline(base, lora=tmp_path / "dit.safetensors")


def test_a_scheduler_takes_the_place_of_the_saved_one(base):
    pipeline = open_pipeline(base, scheduler="LCMScheduler")
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    for wrong in ("LCM", "StableDiffusionPipeline", "NoSuchScheduler"):
        with pytest.raises(UserError, match="has no scheduler"):
            open_pipeline(base, scheduler=wrong)


def test_a_generated_folder_is_read_with_what_it_cost(base, tmp_path):
    drawn = open_source(base, steps=2, guidance_scale=3.0)
    generate(drawn, PROMPTS, tmp_path / "images", batch_size=2)
    stored = open_source(tmp_path / "images")
    expected = (images(drawn) * 255).round() / 255
    torch.testing.assert_close(images(stored), expected, rtol=0, atol=1 / 255 + 1e-6)  # the batch was another: a level at most
    result = evaluate(stored, PROMPTS, lambda images, captions: {"brightness": images.mean().item()})
    assert (result.model, result.nfe, result.steps, result.guidance_scale) == ("base (2 steps)", 4, 2, 3.0)
    assert result.size_mb == size_mb(base)
    assert result.parameters_m == drawn.sizes()["parameters_m"]
    assert result.latency_ms_p50 is None
    with pytest.raises(UserError, match="drawn for other prompts"):
        evaluate(stored, PROMPTS[::-1], lambda images, captions: {})
    shutil.copy(tmp_path / "images" / "000000.png", tmp_path / "images" / "copy.png")
    with pytest.raises(UserError, match="has 4 images and generated 3"):
        open_source(tmp_path / "images")
    (tmp_path / "images" / "000001.png").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 3 images, such as 000001"):
        open_source(tmp_path / "images")


def test_a_folder_of_photographs_is_read_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    subject = open_source(tmp_path, name="real")
    result = evaluate(subject, PROMPTS, lambda images, captions: {}, batch_size=2)
    assert (result.images[:, 0, 0, 0] * 255).tolist() == [1, 2, 10]
    assert (result.model, result.nfe, result.images_per_s) == ("real", None, None)
    with pytest.raises(UserError, match="real has 3 images, and 4 are asked for"):
        evaluate(subject, [*PROMPTS, "x"], lambda images, captions: {})


def test_folders_of_images_are_told_from_pipelines(base, tmp_path):
    for file in ("photos/a.JPG", "classes/cat/a.png", "made/generation.json", "text/notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    folders = [base, *(tmp_path / name for name in ("photos", "classes", "made", "text"))]
    assert [image_folder(path) for path in folders] == [False, True, True, True, False]
    assert not image_folder("fashion")
    with pytest.raises(UserError, match="images, which are there already: lora, steps would change nothing"):
        open_source(tmp_path / "photos", lora="x", steps=3)


def test_nothing_of_that_name(tmp_path):
    with pytest.raises(UserError, match="no folder nowhere"):
        open_source("nowhere")
    with pytest.raises(UserError, match="is no diffusers pipeline"):
        open_source(tmp_path)
