"""Checkpoints: safetensors and JSON, written aside and renamed, read back to the bit.

``checkpoints/step-00000500/`` holds ``state.json``, ``role.<name>.safetensors``, ``optimizer.<name>.safetensors`` and
``ema.safetensors``. No pickle; generators need no saving because every step derives its own (``draws``).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.errors import UserError

_PREFIX = "step-"


def save(folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], *, keep: int) -> Path:
    """Write ``<folder>/step-<step>`` and delete all but the last ``keep`` checkpoints.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints stay.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    aside = folder / f".{target.name}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, values in tensors.items():
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in values.items()}, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps({**state, "step": step, "files": sorted(tensors)}, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot save a checkpoint in {folder}: {error}. Free space or choose another --output.") from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """State and tensors of a checkpoint.

    Raises:
        UserError: a file is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {file.name.removesuffix(".safetensors"): load_file(file) for file in path.glob("*.safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged: {error}. Delete that folder to resume from the one before it.") from error
    missing = sorted(set(state.pop("files", ["the list of its files"])) - tensors.keys())
    if missing:
        raise UserError(f"checkpoint {path} lacks {', '.join(missing)}. Delete that folder to resume from the one before it.")
    return state, tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors: ``"<parameter index>/<name>"``; every entry of torch's is a tensor."""
    return {
        f"{index}/{name}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
