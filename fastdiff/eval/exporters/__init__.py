"""Folders that the scoring tools of composition benchmarks read: GenEval, T2I-CompBench, DPG-Bench, VBench.

The scorers need detectors and pinned libraries of their own and stay outside; this writes what they open, with names as they
parse them. Each module says which file of the benchmark its layout was read from.

>>> export(EXPORTERS["geneval"]("evaluation_metadata.jsonl"), "runs/geneval", pipeline_subject("student", pipeline))
"""

from collections.abc import Callable

from fastdiff.eval.exporters.dpg_bench import dpg_bench
from fastdiff.eval.exporters.geneval import geneval
from fastdiff.eval.exporters.plan import Plan, export
from fastdiff.eval.exporters.t2i_compbench import t2i_compbench
from fastdiff.eval.exporters.vbench import vbench

EXPORTERS: dict[str, Callable[..., Plan]] = {
    "geneval": geneval,
    "t2i-compbench": t2i_compbench,
    "dpg-bench": dpg_bench,
    "vbench": vbench,
}

__all__ = ["EXPORTERS", "Plan", "dpg_bench", "export", "geneval", "t2i_compbench", "vbench"]
