"""The engine, the contract of a method, and one file a method."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.trainers.add import ADD
    from fastdiff.trainers.consistency import Consistency
    from fastdiff.trainers.ctm import CTM
    from fastdiff.trainers.diff_instruct import DiffInstruct
    from fastdiff.trainers.dmd import DMD
    from fastdiff.trainers.dmd2 import DMD2
    from fastdiff.trainers.f_distill import FDistill
    from fastdiff.trainers.hyper_sd import HyperSD
    from fastdiff.trainers.ladd import LADD
    from fastdiff.trainers.lcm import LCM
    from fastdiff.trainers.lcm_lora import LCMLoRA
    from fastdiff.trainers.meanflow import MeanFlow
    from fastdiff.trainers.ode_pairs import ODEPairs
    from fastdiff.trainers.pcm import PCM
    from fastdiff.trainers.perflow import PeRFlow
    from fastdiff.trainers.progressive import ProgressiveDistillation
    from fastdiff.trainers.prolific_dreamer import ProlificDreamer
    from fastdiff.trainers.reflow import Reflow
    from fastdiff.trainers.sana_sprint import SanaSprint
    from fastdiff.trainers.scm import SCM
    from fastdiff.trainers.shortcut import Shortcut
    from fastdiff.trainers.sid import SiD
    from fastdiff.trainers.snoopi import SNOOPI
    from fastdiff.trainers.swiftbrush import SwiftBrush
    from fastdiff.trainers.swiftbrush_v2 import SwiftBrushV2
    from fastdiff.trainers.tcd import TCD
    from fastdiff.trainers.tdm import TDM
    from fastdiff.trainers.teacher_score_matching import TeacherScoreMatching

__all__ = [
    "ADD",
    "CTM",
    "DMD",
    "DMD2",
    "LADD",
    "LCM",
    "PCM",
    "SCM",
    "SNOOPI",
    "TCD",
    "TDM",
    "Consistency",
    "DiffInstruct",
    "FDistill",
    "HyperSD",
    "LCMLoRA",
    "MeanFlow",
    "ODEPairs",
    "PeRFlow",
    "ProgressiveDistillation",
    "ProlificDreamer",
    "Reflow",
    "SanaSprint",
    "Shortcut",
    "SiD",
    "SwiftBrush",
    "SwiftBrushV2",
    "TeacherScoreMatching",
]
_HOMES = {
    "CTM": "ctm",
    "ADD": "add",
    "Consistency": "consistency",
    "DMD": "dmd",
    "DMD2": "dmd2",
    "DiffInstruct": "diff_instruct",
    "FDistill": "f_distill",
    "HyperSD": "hyper_sd",
    "LADD": "ladd",
    "LCM": "lcm",
    "LCMLoRA": "lcm_lora",
    "MeanFlow": "meanflow",
    "ODEPairs": "ode_pairs",
    "PCM": "pcm",
    "PeRFlow": "perflow",
    "ProgressiveDistillation": "progressive",
    "ProlificDreamer": "prolific_dreamer",
    "Reflow": "reflow",
    "SCM": "scm",
    "SNOOPI": "snoopi",
    "Shortcut": "shortcut",
    "SanaSprint": "sana_sprint",
    "SiD": "sid",
    "SwiftBrush": "swiftbrush",
    "SwiftBrushV2": "swiftbrush_v2",
    "TCD": "tcd",
    "TDM": "tdm",
    "TeacherScoreMatching": "teacher_score_matching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff.trainers' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastdiff.trainers.{_HOMES[name]}"), name)
