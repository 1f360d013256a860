"""Write a student as a diffusers folder, and prove in another process that the folder reproduces the trainer's samples."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.process import DiscreteVP
from fastdiff.errors import UserError
from fastdiff.files import aside
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.guidance_embedding import guidance_width
from fastdiff.models.teacher import Teacher
from fastdiff.models.tokenizers import add_slow_files
from fastdiff.pipelines.few_step import LCM_STEPS, ddim_scheduler, lcm_scheduler, rescheduled, tcd_scheduler
from fastdiff.pipelines.one_step import one_step_scheduler, without_guidance

TOLERANCE = 1e-5
NEGATIVE = "negative_prompt.py"  # the copy of pipelines/negative.py in a folder

_CHILD = """
import inspect, json, sys
sys.modules["fastdiff"] = None                       # the folder must work where fastdiff is not installed
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(sys.argv[1]))
calls = []
for folder, given, call in map(json.loads, sys.argv[2:]):
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)  # ours, just written
    pipeline.set_progress_bar_config(disable=True)
    calls.append([])
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    network.register_forward_hook(lambda module, inputs, output: calls[-1].append(len(output[0])))
    prompts = json.load(open(given + ".json"))
    draws = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    takes = inspect.signature(pipeline.__call__).parameters
    if "latents" in takes:
        call["latents"] = load_file(given + ".safetensors")["noise"]
    if "prompt" in takes:
        call["prompt"] = prompts
    elif "class_labels" in takes:
        call["class_labels"] = [int(prompt) for prompt in prompts]
    else:
        call["batch_size"] = len(prompts)
    made = pipeline(generator=draws, output_type="pt", **call)
    images = made.frames if hasattr(made, "frames") else made.images
    save_file({"images": images.contiguous()}, given + ".out.safetensors")
print(json.dumps(calls))
"""

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
A student of `{teacher}` by `{method}`, trained with fastdiff {version}: {calls} per image, {guidance}.

```python
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("path/to/this/folder")("{prompt}"{arguments}).images[0]
```

{extra}{schedule}
"""
_NEGATIVE = """A negative prompt, still without a second network call (NASA or NAG in the cross attention; the file needs torch
and diffusers alone):

```python
from diffusers import DiffusionPipeline
folder = "path/to/this/folder"
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=f"{{folder}}/{negative}", trust_remote_code=True)
pipeline("{prompt}", negative_prompt="red", nasa_scale=0.1).images[0]
```

"""
_ONE_STEP = """`scheduler/` is configured so that the bare call makes exactly one step (`num_inference_steps` up to 50 changes
nothing). It is not meant for img2img, or for making other schedulers from it: `scheduler_lcm/` holds a plain `LCMScheduler` for
that (`LCMScheduler.from_pretrained(folder, subfolder="scheduler_lcm")`, then `num_inference_steps=1`)."""
_DDIM = """`scheduler/` is configured so that the bare call makes exactly the {steps} deterministic steps of the training, at times
{times}. Leave `num_inference_steps` out: another number would make other, untrained steps of this scheduler."""
_LCM = """`scheduler/` is an `LCMScheduler` of {steps} steps at times {times}, with fresh noise between them. Fewer steps skip
some of these times; more are refused."""
_LCM_GRID = """`scheduler/` is an `LCMScheduler` on the {original} times that the student was distilled at; its {steps} steps, with
fresh noise between them, are at times {times}. Any other number up to {original} works, at times of the same grid."""

_TCD = """`scheduler/` is a `TCDScheduler` on the {original} times that the student was distilled at; {steps} steps are at times
{times}. Any other number up to {original} works, and so does any eta from 0 (deterministic) to 1 (noise wholly fresh). **Name
both in the call**: the pipeline takes another number of steps and eta 0 unasked, whatever the scheduler's own defaults are."""


@dataclass(frozen=True)
class Schedule:
    """How a student is called: at which times [K], and what happens between them. Equal to what the exported folder does."""

    times: Sequence[int] | Sequence[float]
    sampler: str
    original_steps: int | None = None
    """Of the grid that a consistency student was distilled on, where it visits only some of them."""
    guidance_scale: float | None = None
    """What a student is told that was trained at many scales; None for all others, which have no such input."""
    guidance_range: tuple[float, float] | None = None
    """Those scales."""
    eta: float | None = None
    """Of the tcd sampler."""

    @property
    def call(self) -> dict[str, Any]:
        """What the exported pipeline must be told besides the prompt: nothing, if its class leaves that choice to its folder."""
        steps, told = len(self.times), dict[str, Any]()
        if self.sampler == "consistency" and steps not in {1, LCM_STEPS}:
            told["num_inference_steps"] = steps
        if self.sampler == "tcd":
            told |= {"num_inference_steps": steps, "eta": self.eta}
        return told if self.guidance_scale is None else told | {"guidance_scale": self.guidance_scale}

    def parts(self, teacher: Teacher) -> tuple[type, Any]:
        """The stock pipeline class and the scheduler of a student of ``teacher``.

        Raises:
            ValueError: no stock scheduler visits these times.
        """
        from diffusers import LatentConsistencyModelPipeline

        times = [int(time) for time in self.times]
        table: Tensor = teacher.process.alphas_cumprod  # type: ignore[attr-defined]
        config = teacher.pipeline.scheduler.config
        if self.sampler == "tcd":
            return type(teacher.pipeline), tcd_scheduler(config, times, len(table), self.original_steps or len(times))
        if len(times) == 1:
            alpha_bar = table[times[0]].item()
            scheduler = one_step_scheduler(alpha_bar, timestep=times[0], prediction_type=teacher.prediction_type)
            return type(teacher.pipeline), scheduler
        if self.sampler == "ddim":
            return type(teacher.pipeline), ddim_scheduler(table, times, teacher.prediction_type)
        return LatentConsistencyModelPipeline, lcm_scheduler(config, times, len(table), self.original_steps)

    def components(self, network: Any) -> dict[str, Any]:
        """What that class is given in place of the teacher's parts: the student's network, and options of its own."""
        unet = without_guidance(network) if guidance_width(network) is None else network
        return {"unet": unet, "requires_safety_checker": False}

    def extras(self, teacher: Teacher, pipeline: Any, folder: Path, prompt: str) -> str:
        """Write further files beside the pipeline's own and return what the card says about them."""
        from diffusers import LCMScheduler

        add_slow_files(folder / "tokenizer")
        if self.sampler == "tcd":
            return ""
        if len(self.times) == 1:
            plain = rescheduled(LCMScheduler, teacher.pipeline.scheduler.config, original_inference_steps=1)
            plain.save_pretrained(folder / "scheduler_lcm")
        if type(pipeline) is not type(teacher.pipeline):
            return ""
        shutil.copyfile(Path(__file__).with_name("negative.py"), folder / NEGATIVE)  # its class has that pipeline's call
        return _NEGATIVE.format(prompt=prompt, negative=NEGATIVE)

    def card(self) -> dict[str, str]:
        """What the model card says about it."""
        steps, times = len(self.times), ", ".join(map(str, self.times))
        few = _DDIM if self.sampler == "ddim" else (_LCM if self.original_steps is None else _LCM_GRID)
        text = _TCD if self.sampler == "tcd" else (_ONE_STEP if steps == 1 else few)
        guidance = "no guidance"
        if self.guidance_range is not None:
            guidance = "guidance is an input of the network, {:g} to {:g}".format(*self.guidance_range)
        return {
            "calls": "one network call" if steps == 1 else f"{steps} network calls",
            "guidance": guidance,
            "arguments": "".join(f", {key}={value}" for key, value in self.call.items()),
            "schedule": text.format(steps=steps, times=times, original=self.original_steps),
        }


def check_exportable(teacher: Teacher) -> None:
    """Refuse, before any training, a teacher whose student could not be saved as a one-step pipeline.

    Raises:
        UserError: the teacher's last time has no signal (no constant beta reaches it), or its network has a guidance embedding
            of its own (which the export would have to replace).
    """
    if teacher.pipeline is None:
        return
    if isinstance(teacher.process, DiscreteVP) and teacher.process.alpha(torch.tensor(int(teacher.process.t_max))) == 0:
        raise UserError(
            f"the last time of {teacher.name} has no signal (zero-terminal SNR): the stock scheduler that makes one step of a bare "
            "call cannot be configured for it, and the student could not be saved. Such teachers are not supported yet."
        )
    if guidance_width(teacher.family.backbone) is not None:
        raise UserError(
            f"the network of {teacher.name} embeds its guidance already (time_cond_proj_dim): the student would ignore what it was "
            "trained with. Take the teacher from before its guidance distillation."
        )


def export_student(
    teacher: Teacher,
    network: Any,
    folder: Path,
    note: Mapping[str, Any],
    schedule: Schedule,
    prompts: list[str],
    noise: Tensor,
    expected: Tensor,
    sample: Callable[[Denoiser, Tensor, Any], Tensor],
) -> tuple[Any, float]:
    """Save the student, load it again, compare its samples with ``expected``.

    Args:
        expected: images [B, 3, H, W]; image i's fresh noise, if the sampler needs any, is of a CPU generator with seed i.

    Returns:
        The diffusers pipeline, or the network itself for a teacher without one (``student.safetensors``), and the largest
        difference.
    """
    if teacher.pipeline is not None:
        pipeline = export_pipeline(teacher, network, folder, schedule, note=note, prompt=prompts[0])
        latents = teacher.family.drawn_from(noise)
        return pipeline, verify_export(folder, schedule, prompts, latents, expected)
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


def export_pipeline(
    teacher: Teacher, network: Any, folder: Path, schedule: Schedule, *, note: Mapping[str, Any], prompt: str
) -> Any:
    """Save ``network`` with the teacher's other components as a pipeline that follows ``schedule``; returns the pipeline.

    The folder is written aside and moved into ``folder`` part by part, ``model_index.json`` last, so that an interrupted save
    leaves nothing that loads. ``note`` goes to ``fastdiff.json``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from fastdiff._version import __version__

    kind, scheduler = schedule.parts(teacher)
    pipeline = kind(**{**teacher.pipeline.components, "scheduler": scheduler, **schedule.components(network)})
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        pipeline.save_pretrained(aside, safe_serialization=True)
        extra = schedule.extras(teacher, pipeline, aside, prompt)
        facts = {"method": note["method"], "teacher": teacher.name, "version": __version__, "prompt": prompt, "extra": extra}
        card = _CARD.format(**facts, **schedule.card())
        (aside / "README.md").write_text(card, encoding="utf-8")
        (aside / "fastdiff.json").write_text(json.dumps(dict(note), indent=2) + "\n", encoding="utf-8")
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in sorted(aside.iterdir(), key=lambda path: path.name == "model_index.json"):
            replace(part, folder / part.name)
        pipeline.register_to_config(_name_or_path=str(folder.resolve()))  # as after loading: the folder's note is its
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


@dataclass(frozen=True)
class Exported:
    """A folder, its call, and the images [B, 3, H, W] or frames [B, F, 3, H, W] that it must make of prompts and ``latents``."""

    folder: Path
    schedule: Schedule
    prompts: list[str]
    latents: Tensor
    expected: Tensor


def verify_export(folder: Path, schedule: Schedule, prompts: list[str], latents: Tensor, expected: Tensor) -> float:
    """``verify_exports`` of one folder."""
    return verify_exports([Exported(folder, schedule, prompts, latents, expected)])[0]


def verify_exports(exported: Sequence[Exported]) -> list[float]:
    """Largest difference between the expected images of each folder and those that it makes in a fresh process.

    The process cannot import fastdiff, loads the folders with ``DiffusionPipeline`` and makes the calls of their cards.

    Raises:
        RuntimeError: a folder does not load, its call made another number of network calls, or the images differ by more than
            ``TOLERANCE``.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for i, one in enumerate(exported):
            given = str(Path(scratch) / f"given-{i}")
            Path(given + ".json").write_text(json.dumps(one.prompts))
            save_file({"noise": one.latents.cpu().contiguous()}, given + ".safetensors")
            jobs.append((str(one.folder.resolve()), given, one.schedule.call))
        command = [sys.executable, "-I", "-c", _CHILD, str(torch.get_num_threads()), *map(json.dumps, jobs)]
        own_code = {**os.environ, "HF_MODULES_CACHE": scratch}  # a pipeline's file is copied before it is run
        child = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=own_code, check=False)
        if child.returncode != 0:
            folders = ", ".join(str(one.folder) for one in exported)
            raise RuntimeError(f"{folders} does not work in plain diffusers:\n{child.stderr[-2000:]}")
        calls = json.loads(child.stdout.splitlines()[-1])
        images = [load_file(given + ".out.safetensors")["images"] for _, given, _ in jobs]
    return [_difference(*each) for each in zip(exported, calls, images, strict=True)]


def _difference(one: Exported, calls: list[int], images: Tensor) -> float:
    n, steps = len(one.prompts), len(one.schedule.times)
    if calls != [n] * steps:
        raise RuntimeError(f"the call on {one.folder} made network calls {calls}, expected {steps} of {n} images.")
    difference = (images - one.expected.cpu()).abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(
            f"{one.folder} in plain diffusers differs from the trainer's samples by {difference:.2e}, allowed {TOLERANCE}."
        )
    return difference
