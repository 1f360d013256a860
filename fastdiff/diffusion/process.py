"""Noise processes: ``x_t = alpha(t) x0 + sigma(t) eps``.

A process owns its time and gives alpha, sigma and their derivatives in float64; tensors keep their own dtype. What makes one
process another is only a change of time and scale: with the noise-to-signal ratio ``r = sigma / alpha``, equal r means equal
information (``matching.SNRMatched``), and every process gives the time that has a given r.

    process          time                 alpha        sigma          a network's time
    DiscreteVP       0, 1, .. T-1         sqrt(abar)   sqrt(1-abar)   t
    ContinuousVP     [0, T-1]             the same, log r interpolated linearly
    EDM              sigma: [0.002, 80]   1            t              ln(t) / 4
    RectifiedFlow    [0, 1]               1 - t        t              1000 t
    TrigFlow         [0, pi/2]            cos t        sigma_data sin t    t

DDPM (NeurIPS 2020, arXiv 2006.11239), EDM (NeurIPS 2022, arXiv 2206.00364), flow matching (ICLR 2023, arXiv 2210.02747),
rectified flow (ICLR 2023, arXiv 2209.03003), sCM (ICLR 2025, arXiv 2410.11081).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEVELS = 1000
"""Training levels of every process, as papers count them: t ~ U{20..980} is of these."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values [B] (or a scalar) shaped [B, 1, ...] to broadcast over ``like`` [B, ...], in its dtype and device."""
    values = values.to(device=like.device, dtype=like.dtype)
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (like.ndim - 1))


class NoiseProcess(ABC):
    """The Gaussian path ``x_t = alpha(t) x0 + sigma(t) eps``; times are tensors [B] or scalars."""

    t_min: float = 0.0
    t_max: float
    sigma_data: float = 1.0
    """Standard deviation of the data that the EDM and TrigFlow parametrisations are scaled by."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient, float64, the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, float64, the shape of ``t``."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, float64, the shape of ``t``."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """d sigma / dt, float64, the shape of ``t``."""

    @abstractmethod
    def t_from_nsr(self, r: Tensor) -> Tensor:
        """The time whose noise-to-signal ratio is ``r``: the inverse of ``nsr``, float64."""

    def network_time(self, t: Tensor) -> Tensor:
        """The number a network trained under this process expects as its time input."""
        return t

    def at_level(self, level: Tensor) -> Tensor:
        """The time of a training level 0..999: ``(level + 1) / 1000`` of ``t_max``, so never 0, where no noise is left."""
        return self.t_max * (_double(level) + 1) / LEVELS

    def level(self, t: Tensor) -> Tensor:
        """The level of a time, a real number: the inverse of ``at_level``, float64."""
        return LEVELS * _double(t) / self.t_max - 1

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio ``r = sigma / alpha``; infinite where there is no signal."""
        return self.sigma(t) / self.alpha(t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``alpha^2 / sigma^2``."""
        return (self.alpha(t) / self.sigma(t)).square()

    def log_snr(self, t: Tensor) -> Tensor:
        """``lambda = log(alpha / sigma)``, half the logarithm of the signal-to-noise ratio, as DPM-Solver has it."""
        return self.alpha(t).log() - self.sigma(t).log()

    def norm(self, t: Tensor) -> Tensor:
        """``rho = sqrt(alpha^2 + sigma^2)``; 1 for variance-preserving processes."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t`` of samples x0 [B, ...], noise eps [B, ...] and times t [B]."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    @property
    def initial_scale(self) -> float:
        """Standard deviation that sampling starts from at ``t_max``: sigma there, and 1 for variance-preserving processes."""
        return 1.0


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

    def at_level(self, level: Tensor) -> Tensor:
        """The row, int64: the level itself where there are 1000 rows, else the nearest share of them."""
        return (_double(level) * self.t_max / (LEVELS - 1)).round().long()

    def level(self, t: Tensor) -> Tensor:
        return _double(t) * (LEVELS - 1) / self.t_max

    def dalpha(self, t: Tensor) -> Tensor:
        """Of the continuous view, at the rows; refused at a last row without signal, which that view does not reach."""
        return self.continuous().dalpha(torch.as_tensor(t).double())

    def dsigma(self, t: Tensor) -> Tensor:
        """Of the continuous view, as ``dalpha`` is."""
        return self.continuous().dsigma(torch.as_tensor(t).double())

    def t_from_nsr(self, r: Tensor) -> Tensor:
        """The row, int64, whose log ratio is nearest; ask the process for its r again, which is not the given one.

        A last row without signal is nearest, by angle, from twice the r of the row before it.
        """
        view = self.continuous()
        row = view.t_from_nsr(r).round().long()
        if view.t_max < self.t_max:
            beyond = torch.as_tensor(r).to("cpu", torch.float64) > 2 * view.nsr(torch.tensor(view.t_max))
            row = torch.where(beyond, int(self.t_max), row)
        return row

    def continuous(self) -> "ContinuousVP":
        """The same process with real times between the rows, for networks that take them."""
        return ContinuousVP(self.alphas_cumprod)

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        index = torch.as_tensor(t)
        if index.is_floating_point():
            raise TypeError("times of a discrete process are integers; a float time would be truncated to its table row.")
        index = index.to("cpu")
        if (index < 0).any():
            raise ValueError(f"time {int(index.min())} is before the start of the process; a negative index would read its end.")
        return table[index]


class ContinuousVP(NoiseProcess):
    """A variance-preserving table read at real times [0, T-1]: log r is linear between rows, so are its derivatives' jumps.

    With zero-terminal SNR the last row's r is infinite; the view ends one row before it.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = DiscreteVP(alphas_cumprod).alphas_cumprod
        self._ends_early = bool((table == 0).any())
        table = table[table > 0]
        self._log_nsr = 0.5 * ((1 - table).log() - table.log())
        self.t_max = len(table) - 1

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log r and its derivative."""
        t = torch.as_tensor(t).to("cpu", torch.float64)
        if ((t < 0) | (t > self.t_max)).any():
            last = "; the table's last row has no signal, where log r and its derivatives are infinite" if self._ends_early else ""
            raise ValueError(f"times must be in 0..{self.t_max}, came {t.min():.6g}..{t.max():.6g}{last}.")
        row = t.floor().long().clamp(max=int(self.t_max) - 1)
        slope = self._log_nsr[row + 1] - self._log_nsr[row]
        return self._log_nsr[row] + (t - row) * slope, slope

    def at_level(self, level: Tensor) -> Tensor:
        """The row as a real time."""
        return _double(level) * self.t_max / (LEVELS - 1)

    def level(self, t: Tensor) -> Tensor:
        return _double(t) * (LEVELS - 1) / self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._at(t)[0]).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._at(t)[0]).sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.sigma(t).square() * self._at(t)[1]

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.alpha(t).square() * self._at(t)[1]

    def t_from_nsr(self, r: Tensor) -> Tensor:
        """Clamped to the table's ends, as diffusers' own interpolation is."""
        value = torch.as_tensor(r).to("cpu", torch.float64).log()
        row = (torch.searchsorted(self._log_nsr, value.contiguous()) - 1).clamp(0, int(self.t_max) - 1)
        low, high = self._log_nsr[row], self._log_nsr[row + 1]
        return row + ((value - low) / (high - low)).clamp(0, 1)


class EDM(NoiseProcess):
    """Variance-exploding process whose time is sigma itself."""

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        self.t_min, self.t_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def at_level(self, level: Tensor) -> Tensor:
        """Karras's grid with rho 7, rising (DMD2, EDM's equation 5)."""
        low, high = (end ** (1 / 7) for end in (self.t_min, self.t_max))
        share = _double(level) / (LEVELS - 1)
        return torch.pow(low + share * (high - low), 7)

    def level(self, t: Tensor) -> Tensor:
        low, high = (end ** (1 / 7) for end in (self.t_min, self.t_max))
        share: Tensor = (torch.pow(_double(t), 1 / 7) - low) / (high - low)
        return (LEVELS - 1) * share

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(_double(t))

    def sigma(self, t: Tensor) -> Tensor:
        return _double(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(_double(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_double(t))

    def t_from_nsr(self, r: Tensor) -> Tensor:
        return _double(r)

    def network_time(self, t: Tensor) -> Tensor:
        """``c_noise = ln(sigma) / 4``."""
        return _double(t).log() / 4

    @property
    def initial_scale(self) -> float:
        return self.t_max


class RectifiedFlow(NoiseProcess):
    """The straight path between data (t = 0) and noise (t = 1).

    Args:
        shift: k of the teacher's sampling grid (``times.shift_time``); the path itself does not depend on it.
        dynamic_shift: the resolution-dependent one of FLUX, which replaces ``shift`` when given.
        num_train_timesteps: what a network's time is multiplied by.
    """

    def __init__(
        self, *, shift: float = 1.0, dynamic_shift: Mapping[str, Any] | None = None, num_train_timesteps: int = 1000
    ) -> None:
        self.t_max, self.shift, self.num_train_timesteps = 1.0, shift, num_train_timesteps
        self.dynamic_shift = dict(dynamic_shift) if dynamic_shift else None

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _double(t)

    def sigma(self, t: Tensor) -> Tensor:
        return _double(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(_double(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(_double(t))

    def t_from_nsr(self, r: Tensor) -> Tensor:
        """``r / (1 + r)``; infinity is t = 1."""
        return 1 / (1 + 1 / _double(r))

    def network_time(self, t: Tensor) -> Tensor:
        return _double(t) * self.num_train_timesteps


class TrigFlow(NoiseProcess):
    """The circle ``x_t = cos t x0 + sin t z`` with ``z = sigma_data eps``."""

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        self.t_max, self.sigma_data = math.pi / 2, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return _double(t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * _double(t).sin()

    def dalpha(self, t: Tensor) -> Tensor:
        return -_double(t).sin()

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * _double(t).cos()

    def nsr(self, t: Tensor) -> Tensor:
        """``sigma_data tan t``, infinite from pi/2 on: float32 rounds pi/2 up, and diffusers starts at 1.57080."""
        r = self.sigma_data * _double(t).tan()
        return torch.where(r < 0, torch.inf, r)

    def t_from_nsr(self, r: Tensor) -> Tensor:
        return torch.atan(_double(r) / self.sigma_data)

    @property
    def initial_scale(self) -> float:
        return self.sigma_data


def _double(t: Tensor) -> Tensor:
    return torch.as_tensor(t).to(torch.float64)
