"""Noise processes, predictions, solvers, guidance, derivatives and exact laws: tensors in, tensors out."""

from fastdiff.diffusion import guidance, times
from fastdiff.diffusion.exact import GaussianMixture, PointCloud
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.guidance import guide
from fastdiff.diffusion.jvp import inner, jvp_central, jvp_forward, jvp_one_sided, math_attention, random_state, time_step
from fastdiff.diffusion.jvp_choice import JVPChoice, choose_jvp
from fastdiff.diffusion.matching import SNRMatched, match_state, snap_time
from fastdiff.diffusion.prediction import PREDICTION_TYPES, Prediction, convert, input_scale, output_from_x0, x0_from_output
from fastdiff.diffusion.process import EDM, ContinuousVP, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.reference import reference_flow_map
from fastdiff.diffusion.renoising import consistency_step, renoise, tcd_step
from fastdiff.diffusion.schedulers import process_from_scheduler
from fastdiff.diffusion.solvers import (
    ddim_sample,
    ddim_step,
    dpmpp_2m_sample,
    dpmpp_2m_step,
    euler_step,
    heun_step,
    lcm_times,
    leading_times,
    linspace_times,
    sample,
    trailing_times,
)

__all__ = [
    "EDM",
    "PREDICTION_TYPES",
    "ContinuousVP",
    "DiscreteVP",
    "Gaussian",
    "GaussianMixture",
    "JVPChoice",
    "NoiseProcess",
    "PointCloud",
    "Prediction",
    "RectifiedFlow",
    "SNRMatched",
    "TrigFlow",
    "choose_jvp",
    "consistency_step",
    "convert",
    "ddim_sample",
    "ddim_step",
    "dpmpp_2m_sample",
    "dpmpp_2m_step",
    "euler_step",
    "guidance",
    "guide",
    "heun_step",
    "inner",
    "input_scale",
    "jvp_central",
    "jvp_forward",
    "jvp_one_sided",
    "lcm_times",
    "leading_times",
    "linspace_times",
    "match_state",
    "math_attention",
    "output_from_x0",
    "process_from_scheduler",
    "random_state",
    "reference_flow_map",
    "renoise",
    "sample",
    "snap_time",
    "tcd_step",
    "time_step",
    "times",
    "trailing_times",
    "x0_from_output",
]
