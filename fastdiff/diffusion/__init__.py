"""Noise processes, predictions, solvers, guidance and exact laws: tensors in, tensors out."""

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.guidance import guide
from fastdiff.diffusion.prediction import Prediction, x0_from_output
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess, process_from_scheduler
from fastdiff.diffusion.solvers import ddim_sample, ddim_step, trailing_times

__all__ = [
    "DiscreteVP",
    "GaussianMixture",
    "NoiseProcess",
    "Prediction",
    "ddim_sample",
    "ddim_step",
    "guide",
    "process_from_scheduler",
    "trailing_times",
    "x0_from_output",
]
