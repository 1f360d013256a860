"""fastdiff: few-step generators out of diffusion and flow teachers.

>>> from fastdiff import Teacher, Trainer
>>> from fastdiff.trainers import SwiftBrush
>>> pipeline = Trainer(SwiftBrush(), Teacher.from_pretrained("fashion"), output_dir="runs/sb", max_steps=1000).train()

Importing the package imports nothing heavy: the names below load where they are first used.
"""

from typing import TYPE_CHECKING, Any

from fastdiff._version import __version__

if TYPE_CHECKING:
    from fastdiff.models.teacher import Teacher
    from fastdiff.trainers.engine import Trainer

_HOMES = {"Teacher": "fastdiff.models.teacher", "Trainer": "fastdiff.trainers.engine"}
__all__ = ["Teacher", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
