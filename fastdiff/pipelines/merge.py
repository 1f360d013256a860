"""Two exported students of one teacher merged by their weights (SwiftBrush v2, ECCV 2024, arXiv 2408.14176).

    W = share A + (1 - share) B          share 1 and 0 are A and B to the bit

It makes sense for students that left the same weights: those of their common teacher. ``merge_students`` refuses others.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.files import aside
from fastdiff.pipelines.export import NEGATIVE

_NETWORK = Path("unet") / "diffusion_pytorch_model.safetensors"
_MODULE = Path("student.safetensors")


def merge(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """``share first + (1 - share) second`` of two networks' weights, in float32 or better, each in its own dtype again.

    Raises:
        ValueError: ``share`` is not in [0, 1], or the networks have other weights.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}: it must be in [0, 1]; outside, the merged student is beyond both.")
    shapes = [{key: (value.shape, value.dtype) for key, value in weights.items()} for weights in (first, second)]
    unlike = sorted(key for key in first.keys() | second.keys() if shapes[0].get(key) != shapes[1].get(key))
    if unlike:
        raise UserError(f"the two students have other weights, such as {unlike[0]}: they are no networks of one kind.")
    if share in {0, 1}:
        return {key: value.clone() for key, value in (first if share == 1 else second).items()}
    return {key: _between(value, second[key], share, key) for key, value in first.items()}


def _between(first: Tensor, second: Tensor, share: float, key: str) -> Tensor:
    if first.is_floating_point():
        return torch.lerp(second.double(), first.double(), share).to(first.dtype)
    if not torch.equal(first, second):
        raise UserError(f"{key} holds integers that differ: there is nothing between them.")
    return first.clone()


def merge_students(first: Path, second: Path, output: Path, share: float = 0.5) -> None:
    """Write the merged student of two folders that trainings exported; what else is in it comes from ``first``.

    Raises:
        UserError: a folder holds no exported student, the students have other teachers or are called at other times, or
            ``output`` exists.
    """
    notes = [_note(first), _note(second)]
    for key in ("teacher_hash", "timesteps"):
        ours, theirs = (note["run"].get(key, note.get(key)) for note in notes)
        if ours != theirs:
            raise UserError(f"{first} and {second} have other {key}, {ours} and {theirs}: no student is between them.")
    if output.exists():
        raise UserError(f"{output} exists: what is in it would be mixed with the merged student. Choose another --output.")
    file = _NETWORK if (first / "model_index.json").is_file() else _MODULE
    merged = merge(load_file(first / file), load_file(second / file), share)
    with aside(output) as part:
        _copy(first, part)
        save_file(merged, part / file, metadata={"format": "pt"})
        note = {**notes[0], "merged": {"share": share, "first": notes[0]["run"], "second": notes[1]["run"]}}
        (part / "fastdiff.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _note(folder: Path) -> dict[str, Any]:
    if not (folder / "fastdiff.json").is_file():
        raise UserError(
            f"{folder} holds no exported student: it has no fastdiff.json. Pass the --output folder of a finished training."
        )
    note: dict[str, Any] = json.loads((folder / "fastdiff.json").read_text(encoding="utf-8"))
    return note


def _copy(folder: Path, target: Path) -> None:
    """What of a run's folder is its student: not its checkpoints, pairs, pictures and logs."""
    target.mkdir(parents=True)
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = [name for name in json.loads(index.read_text(encoding="utf-8")) if (folder / name).is_dir()]
    for name in [*parts, "scheduler_lcm"]:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
    for name in ("model_index.json", "README.md", NEGATIVE):
        if (folder / name).is_file():
            shutil.copy2(folder / name, target / name)
