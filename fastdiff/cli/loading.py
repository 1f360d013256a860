"""Saved pipelines for the commands that draw with them. Everything heavy loads inside the functions."""

import inspect
from typing import Any

from fastdiff.errors import UserError


def device_of(name: str) -> str:
    """The device called ``name``; ``auto`` takes a GPU when there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--device {name} cannot be used here: {reason} Use cpu, or leave it to auto.") from error
    return name


def quiet() -> None:
    """Switch off the libraries' bars for reading and writing files; ours for training and evaluation stay."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def open_pipeline(name: str, device: str) -> Any:
    """A text-to-image pipeline by folder, hub id or bundled name, on ``device``."""
    from fastdiff.models.teacher import load_pipeline

    quiet()
    pipeline = load_pipeline(name)
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"{name} is a {type(pipeline).__name__}, which takes no prompt; pass a text-to-image pipeline.")
    return pipeline.to(device_of(device))
