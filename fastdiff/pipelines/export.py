"""Write a student as a diffusers folder, and prove in another process that the folder reproduces the trainer's samples."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.files import aside
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.teacher import Teacher
from fastdiff.models.tokenizers import add_slow_files
from fastdiff.pipelines.one_step import one_step_scheduler, without_guidance

TOLERANCE = 1e-5

_CHILD = """
import json, sys
sys.modules["fastdiff"] = None                       # the folder must work where fastdiff is not installed
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
folder, given, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)  # ours, just written
pipeline.set_progress_bar_config(disable=True)
calls = []
pipeline.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
prompts = json.load(open(given + ".json"))
images = pipeline(prompts, latents=load_file(given + ".safetensors")["noise"], output_type="pt").images
save_file({"images": images.contiguous()}, given + ".out.safetensors")
print(json.dumps({"calls": calls, "class": type(pipeline).__name__}))
"""

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
A {method} student of `{teacher}`, trained with fastdiff {version}: one network call per image, no guidance.

```python
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("path/to/this/folder")("{prompt}").images[0]
```

`scheduler/` is configured so that the bare call makes exactly one step (`num_inference_steps` up to 50 changes nothing). It is
not meant for img2img, or for making other schedulers from it: `scheduler_lcm/` holds a plain `LCMScheduler` for that
(`LCMScheduler.from_pretrained(folder, subfolder="scheduler_lcm")`, then `num_inference_steps=1`).
"""


def check_exportable(teacher: Teacher) -> None:
    """Refuse, before any training, a teacher whose student could not be saved as a one-step pipeline.

    Raises:
        UserError: the teacher's last time has no signal (no constant beta reaches it), or its network has a guidance embedding
            of its own (which the export would have to replace).
    """
    if teacher.pipeline is None:
        return
    if teacher.process.alpha(torch.tensor(int(teacher.process.t_max))) == 0:
        raise UserError(
            f"the last time of {teacher.name} has no signal (zero-terminal SNR): the stock scheduler that makes one step of a bare "
            "call cannot be configured for it, and the student could not be saved. Such teachers are not supported yet."
        )
    if getattr(teacher.family.backbone.config, "time_cond_proj_dim", None) is not None:
        raise UserError(
            f"the network of {teacher.name} embeds its guidance already (time_cond_proj_dim): the student would ignore what it was "
            "trained with. Take the teacher from before its guidance distillation."
        )


def export_student(
    teacher: Teacher,
    network: Any,
    folder: Path,
    note: Mapping[str, Any],
    prompts: list[str],
    noise: Tensor,
    expected: Tensor,
    sample: Callable[[Denoiser, Tensor, Any], Tensor],
) -> tuple[Any, float]:
    """Save the student, load it again, compare its samples with ``expected``.

    Returns:
        The diffusers pipeline, or the network itself for a teacher without one (``student.safetensors``), and the largest
        difference.
    """
    if teacher.pipeline is not None:
        pipeline = export_one_step(teacher, network, folder, note=note, prompt=prompts[0])
        return pipeline, verify_export(folder, prompts, noise, expected)
    export_module(network, folder, note)
    again = copy.deepcopy(network)
    load_module(again, folder)
    student = Denoiser(teacher.family.network(again), teacher.process, teacher.prediction_type)
    with torch.no_grad():
        images = teacher.decode(sample(student, noise, teacher.encode(prompts)))
    return network, (images - expected).abs().max().item()


def export_module(network: torch.nn.Module, folder: Path, note: Mapping[str, Any]) -> None:
    """Write a network that is no part of a diffusers pipeline: ``student.safetensors`` with ``note`` in ``fastdiff.json``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        with aside(folder / "student.safetensors") as part:
            save_model(network, str(part))
        with aside(folder / "fastdiff.json") as part:
            part.write_text(json.dumps(dict(note), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the student to {folder}: {error}. Free space or choose another --output; the checkpoint is kept."
        ) from error


def load_module(network: torch.nn.Module, folder: Path) -> None:
    """Put the weights that ``export_module`` wrote into a network of the same class."""
    from safetensors.torch import load_model

    load_model(network, str(folder / "student.safetensors"))


def exported_scheduler(teacher: Teacher) -> Any:
    """The stock scheduler that a student of ``teacher`` is saved with."""
    last = int(teacher.process.t_max)
    alpha_bar = teacher.process.alpha(torch.tensor(last)).square().item()
    return one_step_scheduler(alpha_bar, timestep=last, prediction_type=teacher.prediction_type)


def export_one_step(teacher: Teacher, network: Any, folder: Path, *, note: Mapping[str, Any], prompt: str) -> Any:
    """Save ``network`` with the teacher's other components as a one-step pipeline; returns the pipeline.

    The folder is written aside and moved into ``folder`` part by part, ``model_index.json`` last, so that an interrupted save
    leaves nothing that loads. ``note`` goes to ``fastdiff.json``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from diffusers import LCMScheduler

    from fastdiff._version import __version__

    components = dict(teacher.pipeline.components)
    components["unet"] = without_guidance(network)
    components["scheduler"] = exported_scheduler(teacher)
    pipeline = type(teacher.pipeline)(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        pipeline.save_pretrained(aside, safe_serialization=True)
        add_slow_files(aside / "tokenizer")
        schedule = LCMScheduler.from_config(
            teacher.pipeline.scheduler.config, original_inference_steps=1, timestep_spacing="leading"
        )
        schedule.save_pretrained(aside / "scheduler_lcm")
        card = _CARD.format(method=note["method"], teacher=teacher.name, version=__version__, prompt=prompt)
        (aside / "README.md").write_text(card, encoding="utf-8")
        (aside / "fastdiff.json").write_text(json.dumps(dict(note), indent=2) + "\n", encoding="utf-8")
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in sorted(aside.iterdir(), key=lambda path: path.name == "model_index.json"):
            replace(part, folder / part.name)
    except OSError as error:
        raise UserError(
            f"cannot write the student to {folder}: {error}. Free space or choose another --output; the checkpoint is kept."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return pipeline


def replace(source: Path, target: Path) -> None:
    """Move a file or folder to where another one may be."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def verify_export(folder: Path, prompts: list[str], noise: Tensor, expected: Tensor) -> float:
    """Largest difference between ``expected`` images [B, 3, H, W] in [0, 1] and those of the folder in a fresh process.

    The process cannot import fastdiff, loads the folder with ``DiffusionPipeline`` and makes the bare call.

    Raises:
        RuntimeError: the folder does not load, the call made more than one network call, or the images differ by more than
            ``TOLERANCE``.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        given = str(Path(scratch) / "given")
        Path(given + ".json").write_text(json.dumps(prompts))
        save_file({"noise": noise.cpu().contiguous()}, given + ".safetensors")
        command = [sys.executable, "-I", "-c", _CHILD, str(folder.resolve()), given, str(torch.get_num_threads())]
        own_code = {**os.environ, "HF_MODULES_CACHE": scratch}  # a pipeline's file is copied before it is run
        child = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=own_code, check=False)
        if child.returncode != 0:
            raise RuntimeError(f"{folder} does not work in plain diffusers:\n{child.stderr[-2000:]}")
        report = json.loads(child.stdout.splitlines()[-1])
        images = load_file(given + ".out.safetensors")["images"]
    if report["calls"] != [len(prompts)]:
        raise RuntimeError(
            f"the bare call on {folder} made network calls {report['calls']}, expected one of {len(prompts)} images."
        )
    difference = (images - expected.cpu()).abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(
            f"{folder} in plain diffusers differs from the trainer's samples by {difference:.2e}, allowed {TOLERANCE}."
        )
    return difference
