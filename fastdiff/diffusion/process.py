"""Noise processes: ``x_t = alpha(t) x0 + sigma(t) eps``.

A process owns its time and gives alpha and sigma in float64; tensors keep their own dtype. ``DiscreteVP`` is the one of
Stable Diffusion: t = 0..T-1, ``alpha = sqrt(abar_t)``, ``sigma = sqrt(1 - abar_t)`` (Ho et al., DDPM, NeurIPS 2020,
arXiv 2006.11239), read from a diffusers scheduler's own table, never guessed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B] (or a scalar) shaped [B, 1, ...] to broadcast over ``like`` [B, ...], in its dtype and device."""
    values = values.to(device=like.device, dtype=like.dtype)
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(ABC):
    """The Gaussian path ``x_t = alpha(t) x0 + sigma(t) eps``; times are tensors [B] or scalars."""

    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient, float64, the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, float64, the shape of ``t``."""

    def network_time(self, t: Tensor) -> Tensor:
        """The number a network trained under this process expects as its time input."""
        return t

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha^2 / sigma^2``."""
        return (self.alpha(t) / self.sigma(t)).square()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of samples x0 [B, ...], noise eps [B, ...] and times t [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps


class DiscreteVP(NoiseProcess):
    """Variance-preserving process on the integer times 0..T-1 of a table ``alphas_cumprod`` [T].

    Raises:
        ValueError: the table is not in (0, 1) and decreasing. A zero at the end (zero-terminal SNR) is allowed.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or not ((table >= 0) & (table < 1)).all() or not (table.diff() < 0).all():
            raise ValueError(
                f"alphas_cumprod must be a decreasing table in [0, 1), came [{table.flatten()[0]:.4g} .. "
                f"{table.flatten()[-1]:.4g}] of shape {tuple(table.shape)}: times would not be ordered by noise."
            )
        self.alphas_cumprod = table
        self.t_max = len(table) - 1
        self._alpha, self._sigma = table.sqrt(), (1 - table).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(self._alpha, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._at(self._sigma, t)

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        index = torch.as_tensor(t)
        if index.is_floating_point():
            raise TypeError("times of a discrete process are integers; a float time would be truncated to its table row.")
        index = index.to("cpu")
        if (index < 0).any():
            raise ValueError(f"time {int(index.min())} is before the start of the process; a negative index would read its end.")
        return table[index]


def process_from_scheduler(config: Mapping[str, Any]) -> tuple[NoiseProcess, str]:
    """The process and prediction type ("epsilon", "v_prediction", "sample") that a diffusers scheduler config describes.

    Raises:
        ValueError: the schedule is not one of the VP family.
    """
    from diffusers import DDPMScheduler

    prediction = str(config.get("prediction_type", "epsilon"))
    if "beta_schedule" not in config or prediction not in {"epsilon", "v_prediction", "sample"}:
        raise ValueError(
            f"scheduler {config.get('_class_name', '?')} with prediction type {prediction!r} is no variance-preserving "
            "process (it has no beta_schedule): its sigmas would be read as something they are not. Supported now: the "
            "schedulers of Stable Diffusion and SDXL."
        )
    names = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
    scheduler = DDPMScheduler(**{key: value for key, value in config.items() if key in names})
    return DiscreteVP(scheduler.alphas_cumprod), prediction
