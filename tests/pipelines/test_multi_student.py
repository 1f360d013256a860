"""One folder of several students: routing, order, laziness, and a process that cannot import fastdiff."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_teacher

from fastdiff.data.fashion import captions
from fastdiff.data.partition import Partition
from fastdiff.errors import UserError
from fastdiff.models.teacher import load_pipeline
from fastdiff.trainers import SwiftBrush
from fastdiff.trainers.config import Config
from fastdiff.trainers.multi_student import MultiStudent, Stage, load_students

PROMPTS = captions()[::40]  # 14
OTHERS = captions()[3::40]
CHILD = """
import sys, json
sys.modules["fastdiff"] = None
import torch
from diffusers import DiffusionPipeline
found = []
for custom in (None, sys.argv[1] + "/multi_student.py"):
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=custom, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    loaded = pipeline.touched()["loaded"]
    images = pipeline(json.loads(sys.argv[2]), generator=torch.Generator().manual_seed(5), output_type="pt").images
    found.append([loaded, pipeline.touched(), images.double().sum((1, 2, 3)).tolist()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three students of a tiny teacher, trained apart at a rate that tells them apart, and their pipeline."""
    path = tmp_path_factory.mktemp("students")
    teacher = tiny_teacher()
    config = Config(max_steps=3, batch_size=4, validate_every=0, ema_decay=0.0, warmup_steps=0)
    stage = Stage(method=SwiftBrush(lr=1e-3, rank=2, guidance_scale=1.0), config=config)
    run = MultiStudent(teacher=teacher, partition=Partition.by_clusters(PROMPTS, 3, teacher), stages={"dm": stage}, folder=path)
    run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    return path


@pytest.fixture
def pipeline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    return load_students(folder)


def draw(pipeline: Any, prompts: list[str], noise: torch.Tensor, **options: Any) -> torch.Tensor:
    return pipeline(prompts, latents=noise, output_type="pt", **options).images


def noises(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def test_the_folder_holds_each_student_once_and_everything_else_once(folder: Path) -> None:
    partition, index = Partition.load(folder), json.loads((folder / "model_index.json").read_text())
    assert sorted(path.name for path in (folder / "students").iterdir()) == ["0", "1", "2"]
    assert not (folder / "unet").exists()
    assert "fastdiff" not in {line.split()[1].split(".")[0] for line in _imports(folder / "multi_student.py")}
    sizes = [sum(v.numel() for v in _weights(folder, k).values()) for k in range(3)]
    assert index["parameters"] == sizes
    assert partition.sizes == [5, 5, 4] or sorted(partition.sizes) == [4, 5, 5]


def _imports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]


def _weights(folder: Path, k: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "students" / str(k) / "unet" / "diffusion_pytorch_model.safetensors")


def test_every_row_is_the_work_of_its_own_student(folder: Path, pipeline: Any) -> None:
    """Against the plain one-step pipelines that the runs exported, image by image; another student gives another image."""
    from diffusers import DiffusionPipeline

    partition, noise = Partition.load(folder), noises(len(PROMPTS))
    images = draw(pipeline, PROMPTS, noise)
    for k in range(3):
        plain = DiffusionPipeline.from_pretrained(folder / "runs" / str(k) / "dm", use_safetensors=True)
        plain.set_progress_bar_config(disable=True)
        alone = draw(plain, PROMPTS, noise)
        mine = torch.tensor(partition.part) == k
        assert (alone - images)[mine].abs().max() < 1e-5
        assert (alone - images)[~mine].abs().amax((1, 2, 3)).min() > 1e-4


def test_a_shuffled_batch_gives_the_shuffled_images(pipeline: Any) -> None:
    noise, order = noises(len(PROMPTS)), torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(2))
    straight = draw(pipeline, PROMPTS, noise)
    shuffled = draw(pipeline, [PROMPTS[i] for i in order.tolist()], noise[order])
    assert torch.allclose(shuffled, straight[order], atol=1e-6)


def test_noise_belongs_to_the_sample_and_not_to_the_group(pipeline: Any) -> None:
    """The one generator of a call draws for the batch in its order, as the plain pipeline does; each own generator for its row."""
    whole = pipeline(PROMPTS, generator=torch.Generator().manual_seed(3), output_type="pt").images
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(whole, draw(pipeline, PROMPTS, noise), atol=1e-6)
    draws = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    own = pipeline(PROMPTS, generator=draws, output_type="pt").images
    last = pipeline(PROMPTS[-1], generator=torch.Generator().manual_seed(len(PROMPTS) - 1), output_type="pt").images
    assert torch.allclose(own[-1:], last, atol=1e-5)


def test_several_images_of_a_prompt_are_of_its_student(pipeline: Any) -> None:
    noise = noises(6)
    found = draw(pipeline, PROMPTS[:3], noise, num_images_per_prompt=2)
    repeated = draw(pipeline, [prompt for prompt in PROMPTS[:3] for _ in range(2)], noise)
    assert torch.allclose(found, repeated, atol=1e-6)


def test_students_are_read_when_first_asked_for_and_touched_says_what_ran(folder: Path, pipeline: Any) -> None:
    partition = Partition.load(folder)
    sizes = [sum(v.numel() for v in _weights(folder, k).values()) for k in range(3)]
    shared = sum(p.numel() for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    nothing = {"students": [], "student": 0, "shared": shared, "all": shared + sum(sizes), "loaded": []}
    assert pipeline.touched() == nothing
    for k, loaded in ((2, [2]), (0, [0, 2])):
        prompt = PROMPTS[partition.rows(k)[0]]
        draw(pipeline, [prompt], noises(1))
        assert pipeline.touched() == {**nothing, "students": [k], "student": sizes[k], "loaded": loaded}


def test_a_limit_keeps_the_last_used_students_and_changes_no_image(pipeline: Any) -> None:
    noise = noises(len(PROMPTS))
    free = draw(pipeline, PROMPTS, noise)
    assert pipeline.touched()["loaded"] == [0, 1, 2]
    pipeline.keep(1)
    assert pipeline.touched()["loaded"] == [2]
    assert torch.equal(draw(pipeline, PROMPTS, noise), free)
    assert len(pipeline.touched()["loaded"]) == 1
    assert pipeline.touched()["students"] == [0, 1, 2]
    with pytest.raises(ValueError, match="limit is 0"):
        pipeline.keep(0)


def test_unknown_prompts_go_where_the_partition_sends_them(folder: Path, pipeline: Any) -> None:
    expected = Partition.load(folder).route([*OTHERS, *PROMPTS, ""], tiny_teacher())
    assert pipeline.students_of([*OTHERS, *PROMPTS, ""]).tolist() == expected.tolist()


def test_without_centroids_an_unknown_prompt_needs_a_choice(folder: Path, pipeline: Any) -> None:
    pipeline._partition = pipeline.partition[0], None
    with pytest.raises(ValueError, match="choose one"):
        pipeline(OTHERS[0])
    noise = noises(2)
    chosen = draw(pipeline, OTHERS[:2], noise, student=[1, 2])
    assert pipeline.touched()["students"] == [1, 2]
    assert torch.allclose(chosen[:1], draw(pipeline, OTHERS[:1], noise[:1], student=1), atol=1e-6)


def test_one_call_is_one_step_without_guidance_whatever_is_passed(pipeline: Any) -> None:
    seen: list[int] = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    noise = noises(2)
    bare = draw(pipeline, PROMPTS[:2], noise)
    assert torch.equal(draw(pipeline, PROMPTS[:2], noise, num_inference_steps=50, guidance_scale=7.5), bare)
    assert seen == [2, 2]


def test_it_is_refused_to_save_what_is_not_loaded(pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="copy the folder"):
        pipeline.save_pretrained(tmp_path)


def test_the_folder_works_where_fastdiff_is_not_installed(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    """By its own model_index.json, and with its file named as custom_pipeline."""
    prompts = PROMPTS[:5]
    words = [str(folder), json.dumps(prompts)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    child = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert child.returncode == 0, child.stderr[-2000:]
    images = pipeline(prompts, generator=torch.Generator().manual_seed(5), output_type="pt").images
    found = json.loads(child.stdout.splitlines()[-1])
    assert len(found) == 2
    for loaded, touched, sums in found:
        assert loaded == []
        assert torch.allclose(torch.tensor(sums, dtype=torch.float64), images.double().sum((1, 2, 3)), rtol=1e-6)
        assert touched == pipeline.touched()


def test_the_commands_load_this_folder_and_no_other_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    noise = torch.randn(4, *tiny_teacher().latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(load_pipeline(folder), PROMPTS[:4], noise), draw(load_students(folder), PROMPTS[:4], noise))
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    source = changed / "multi_student.py"
    source.write_text(source.read_text() + "\nraise SystemExit('this ran')\n")
    with pytest.raises(UserError, match="runs code of its own"):
        load_pipeline(changed)
