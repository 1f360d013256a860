"""The engine, the contract of a method, and one file a method."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.trainers.dmd2 import DMD2
    from fastdiff.trainers.ode_pairs import ODEPairs
    from fastdiff.trainers.swiftbrush import SwiftBrush
    from fastdiff.trainers.teacher_score_matching import TeacherScoreMatching

__all__ = ["DMD2", "ODEPairs", "SwiftBrush", "TeacherScoreMatching"]
_HOMES = {
    "DMD2": "dmd2",
    "ODEPairs": "ode_pairs",
    "SwiftBrush": "swiftbrush",
    "TeacherScoreMatching": "teacher_score_matching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff.trainers' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastdiff.trainers.{_HOMES[name]}"), name)
