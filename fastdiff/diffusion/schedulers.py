"""The noise process a diffusers scheduler describes, read from its own config and tables, never guessed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.process import EDM, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow


def process_from_scheduler(scheduler: Any) -> tuple[NoiseProcess, str]:
    """The process and prediction type (see ``prediction``) of a diffusers scheduler, or of its config as saved.

    diffusers writes the class's name into a config only when it saves it: give a scheduler that was built in memory itself.

    Raises:
        ValueError: it describes none of the processes known here.
    """
    config: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    name = type(scheduler).__name__ if config is not scheduler else str(config.get("_class_name", "(of no class)"))
    prediction = str(config.get("prediction_type", "epsilon"))
    if name.startswith("FlowMatch"):
        if config.get("invert_sigmas"):
            raise ValueError(
                f"scheduler {name} with invert_sigmas: its network's time runs from noise to data and it predicts minus the "
                "velocity, so as a flow it would be asked at the wrong times. Wrap the network and give RectifiedFlow yourself."
            )
        return _flow(config, config.get("shift", 1.0)), "flow_prediction"
    if prediction == "flow_prediction" or (config.get("use_flow_sigmas") and prediction in {"epsilon", "sample"}):
        return _flow(config, config.get("flow_shift", 1.0)), prediction
    if name == "SCMScheduler" and config.get("prediction_type", "trigflow") == "trigflow":
        return TrigFlow(sigma_data=config.get("sigma_data", 0.5)), "trigflow"
    if name.startswith("EDM") and prediction in {"epsilon", "v_prediction"}:  # diffusers' names of F and -F
        sigmas = {key: config[key] for key in ("sigma_min", "sigma_max", "sigma_data") if key in config}
        return EDM(**sigmas), "edm" if prediction == "epsilon" else "trigflow"
    known = {"epsilon", "v_prediction", "sample"}
    if "beta_schedule" not in config or config.get("use_flow_sigmas") or prediction not in known or name.startswith("EDM"):
        raise ValueError(
            f"scheduler {name} with prediction type {prediction!r} is no process known here: its sigmas would be read as "
            "something they are not. Known: schedulers with a beta_schedule, FlowMatch*, EDM*, SCMScheduler; a config built in "
            "memory has no class, so pass the scheduler itself."
        )
    process = DiscreteVP(_vp_table(config))
    if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        return _continuous_euler(config, process), "trigflow"
    return process, prediction


def _vp_table(config: Mapping[str, Any]) -> Tensor:
    from diffusers import CogVideoXDDIMScheduler, DDPMScheduler

    kind, names = DDPMScheduler, {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
    if "snr_shift_scale" in config:  # CogVideoX: r is multiplied by the root of it, before any rescaling to zero SNR
        kind, names = CogVideoXDDIMScheduler, names | {"snr_shift_scale"}
    names = names | {"rescale_betas_zero_snr"}
    try:
        table: Tensor = kind(**{key: value for key, value in config.items() if key in names}).alphas_cumprod
    except NotImplementedError as error:
        raise ValueError(f"beta_schedule {config['beta_schedule']!r} is not known: pass its betas as trained_betas.") from error
    return table


def _flow(config: Mapping[str, Any], shift: float) -> RectifiedFlow:
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
    by_size = {key: config[key] for key in names if key in config} if config.get("use_dynamic_shifting") else None
    return RectifiedFlow(shift=shift, dynamic_shift=by_size, num_train_timesteps=int(config.get("num_train_timesteps", 1000)))


def _continuous_euler(config: Mapping[str, Any], table: DiscreteVP) -> EDM:
    """Stable Video Diffusion's EulerDiscreteScheduler: sigma is the time, ln(sigma) / 4 the network's, its v is F for unit data."""
    low, high = table.nsr(torch.tensor([0, int(table.t_max)])).tolist()
    return EDM(sigma_min=config.get("sigma_min") or low, sigma_max=config.get("sigma_max") or high, sigma_data=1.0)
