"""From a text to a ``Subject``: a student's folder, a diffusers folder, a hub id, a bundled name, with a LoRA on top, or a
folder of images.

>>> open_source("runs/student")                                               # called bare: its folder knows its steps
>>> open_source("owner/base", lora="runs/lora", steps=4, guidance_scale=1.0, scheduler="LCMScheduler")
>>> open_source("runs/images")                                                # read, not drawn
"""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError
from fastdiff.eval.generation import HEADER, Generation
from fastdiff.eval.images import SUFFIXES, ImageFolder
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.eval.subject import Subject
from fastdiff.models.teacher import BUNDLED, load_pipeline

_LORA_NAME = "pytorch_lora_weights.safetensors"


def open_source(
    text: str | Path,
    *,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    fuse: bool = False,
    scheduler: str = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    name: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Subject:
    """What ``text`` names, ready to be evaluated or generated from.

    Args:
        text: a folder of images, a folder that fastdiff or diffusers wrote, a hub id, or ``fashion``.
        lora, lora_scale, fuse: as ``open_pipeline`` takes them.
        scheduler: as ``open_pipeline`` takes it.
        steps, guidance_scale: of the pipeline's call; None leaves them to the pipeline.
        resolution: side of the images in pixels; None is the pipeline's own.
        name: of the row; None is the folder's name.

    Raises:
        UserError: nothing of that name is there, it cannot be loaded, or an option does not apply to it.
    """
    if image_folder(text):
        options = {"lora": lora, "scheduler": scheduler, "steps": steps, "guidance_scale": guidance_scale, "resolution": resolution}
        if given := [key for key, value in options.items() if value]:
            raise UserError(f"{text} is a folder of images, which are there already: {', '.join(given)} would change nothing.")
        return _stored(Path(text), name)
    pipeline = open_pipeline(text, lora=lora, lora_scale=lora_scale, fuse=fuse, scheduler=scheduler, device=device, dtype=dtype)
    files = [folder] if (folder := local_folder(text)) else []
    if lora is not None:
        files = [*files, lora_file(lora)] if files else []
    name = name or Path(text).name + ("" if lora is None else f" + {Path(lora).stem}")
    subject = pipeline_subject(name, pipeline, steps=steps, guidance_scale=guidance_scale, resolution=resolution, files=files)
    return replace(subject, scheduler=scheduler or (None if is_student(text) else ""))


def open_pipeline(
    text: str | Path,
    *,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    fuse: bool = False,
    scheduler: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """The diffusers pipeline of a folder, a hub id or a bundled name, on ``device``.

    Args:
        lora: a safetensors file, or a folder with one, loaded by the pipeline's own ``load_lora_weights``.
        lora_scale: strength of the adapter; 1 is as trained.
        fuse: add it to the weights (``fuse_lora``), so that it costs no time; else it stays beside them, diffusers' default.
        scheduler: a diffusers class that takes the place of the saved one, with its config, such as ``LCMScheduler``.

    Raises:
        UserError: with what is wrong with the name, the folder, the adapter or the scheduler.
    """
    pipeline = load_pipeline(text, dtype=dtype)
    takes = inspect.signature(pipeline.__call__).parameters
    if not {"prompt", "class_labels", "batch_size"} & set(takes):
        raise UserError(
            f"{text} is a {type(pipeline).__name__}, which draws from more than prompts or classes: pass another pipeline."
        )
    if scheduler:
        pipeline.scheduler = _scheduler(scheduler, pipeline.scheduler)
    if lora is not None:
        _adapt(pipeline, lora_file(lora), lora_scale, fuse)
    return pipeline.to(device)


def image_folder(text: str | Path) -> bool:
    """Whether ``text`` is a folder of images: no pipeline, with the header of a generation, an image, or a subfolder with one."""
    path = Path(text)
    if not path.is_dir() or (path / "model_index.json").is_file():
        return False
    found = (file for pattern in ("*", "*/*") for file in path.glob(pattern))
    return (path / HEADER).is_file() or any(file.suffix.lower() in SUFFIXES for file in found)


def is_student(text: str | Path) -> bool:
    """Whether ``text`` is the folder of a student that fastdiff wrote."""
    return (Path(text) / "fastdiff.json").is_file()


def local_folder(text: str | Path) -> Path | None:
    """The folder of a pipeline on this disk: itself, the bundled one, or a hub id's snapshot in the cache; None without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (folder := BUNDLED.get(str(text), Path(text))).is_dir():
        return folder
    try:
        return Path(snapshot_download(str(text), local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def lora_file(path: str | Path) -> Path:
    """The safetensors file of an adapter: ``path`` itself, or the one in it; ``UserError`` when there is none or a choice."""
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if (path / _LORA_NAME) in found:
        return path / _LORA_NAME
    if len(found) == 1:
        return found[0]
    what = f"has {', '.join(file.name for file in found)}" if found else "is no safetensors file and no folder with one"
    raise UserError(f"the LoRA {path} {what}: pass the file itself, or a folder with {_LORA_NAME}.")


def _adapt(pipeline: Any, file: Path, scale: float, fuse: bool) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"a {type(pipeline).__name__} takes no LoRA; pass a pipeline that has load_lora_weights.")
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="lora")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the LoRA {file} does not fit a {type(pipeline).__name__}: {reason}") from error
    if not any(pipeline.get_list_adapters().values()):
        raise UserError(f"the LoRA {file} changed no network of the {type(pipeline).__name__}: it was trained for another one.")
    pipeline.set_adapters(["lora"], [scale])
    if fuse:
        pipeline.fuse_lora(adapter_names=["lora"])
        pipeline.unload_lora_weights()


def _scheduler(name: str, saved: Any) -> Any:
    import diffusers

    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found is None or not hasattr(found, "from_config"):
        raise UserError(f"diffusers has no scheduler {name!r}: give a class name such as LCMScheduler or DDIMScheduler.")
    return found.from_config(saved.config)


def _stored(path: Path, name: str | None) -> Subject:
    if not (path / HEADER).is_file():
        images = ImageFolder(path)
        return Subject(name=name or path.name, stored=images, count=len(images))
    made = Generation.open(path)
    if missing := made.missing():
        raise UserError(
            f"{path} lacks {len(missing)} of its {made.settings['n']} images, such as {missing[0]:06d}: generate the rest first."
        )
    images, resolution = ImageFolder(path, recursive=False), made.settings["resolution"]
    if len(images) != made.settings["n"]:
        raise UserError(f"{path} has {len(images)} images and generated {made.settings['n']}: move the foreign ones elsewhere.")
    return Subject(
        name=name or made.model,
        stored=images,
        count=len(images),
        steps=made.settings["steps"],
        guidance_scale=made.settings["guidance_scale"],
        scheduler=made.settings.get("scheduler", ""),
        resolution=None if resolution is None else (resolution[0], resolution[1]),
        prompts_sha256=made.settings["prompts_sha256"],
        known=made.known,
    )
