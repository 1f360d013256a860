"""Steps of the probability-flow ODE from t to an earlier time u, as plain functions of a ``Prediction``.

``u`` is a tensor [B], or None for the end of the path, where every solver returns x0. With ``r = sigma / alpha`` and
``lambda = -log r``, all but Euler are DDIM plus a multiple of a difference of x0, so they depend on a process only through r:

    DDIM     x_u = a_u x0 + s_u eps
    Heun     + a_u (r_t / r_u - 1) / 2 (x0(x_u, u) - x0)               the trapezoid in (x / a, r)
    2M       + a_u (1 - r_u / r_t) (h / 2 h_last) (x0 - x0_last)       h = lambda_u - lambda_t, h_last = lambda_t - lambda_last
    Euler    x_u = x_t + (u - t) dx/dt                                 in the process's own time; DDIM for flow and EDM

Noise is an argument wherever it enters; nothing here draws any. DDIM (ICLR 2021, arXiv 2010.02502), EDM (NeurIPS 2022, arXiv
2206.00364), DPM-Solver++ (arXiv 2211.01095).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, expand

Denoise = Callable[[Tensor, Tensor], Prediction]
Times = Sequence[int] | Sequence[float] | Tensor


def ddim_step(prediction: Prediction, u: Tensor | None, *, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """The state at ``u``; ``eta`` = 0 is deterministic and 1 ancestral sampling, ``q(x_u | x_t, x0)``.

    A share of the noise is drawn anew: ``x_u = a_u x0 + sqrt(s_u^2 - v) eps + sqrt(v) noise`` with
    ``v = eta^2 s_u^2 (1 - r_u^2 / r_t^2)``, which for variance-preserving processes is the paper's formula. At the end
    s_u = 0 and nothing is drawn; diffusers with ``set_alpha_to_one=False`` ends at row 0 instead, which is ``u = 0``.

    Raises:
        ValueError: eta > 0 without noise, or with u later than t.
    """
    if u is None:
        return prediction.x0
    process, x0 = prediction.process, prediction.x0
    a, s = process.alpha(u), process.sigma(u)
    if eta == 0:
        return expand(a, x0) * x0 + expand(s, x0) * prediction.eps
    if noise is None:
        raise ValueError(f"eta = {eta} draws noise anew, and none was given: pass noise=, of the shape of x0.")
    ratio = process.alpha(prediction.t) * s / (a * process.sigma(prediction.t))
    if (ratio > 1).any():
        raise ValueError("eta > 0 adds noise on the way down, and u is later than t: use renoising.renoise to go up.")
    fresh = eta * s * (1 - ratio.square()).sqrt()
    kept = (s.square() - fresh.square()).clamp(min=0).sqrt()
    return expand(a, x0) * x0 + expand(kept, x0) * prediction.eps + expand(fresh, x0) * noise


def ddim_target(x_t: Tensor, t: Tensor, x_u: Tensor, u: Tensor, process: NoiseProcess) -> Tensor:
    """The x0 whose DDIM step from (x_t, t) ends at (x_u, u), u earlier: ``(x_u - k x_t) / (a_u - k a_t)``, ``k = s_u / s_t``.

    What one step of a student has to predict to repeat several of its teacher (progressive distillation, ICLR 2022).
    """
    k = process.sigma(u) / process.sigma(t)
    return (x_u - expand(k, x_t) * x_t) / expand(process.alpha(u) - k * process.alpha(t), x_t)


def euler_step(prediction: Prediction, u: Tensor | None) -> Tensor:
    """``x_t + (u - t) dx/dt`` in the process's own time: one straight step along the velocity."""
    if u is None:
        return prediction.x0
    return prediction.x_t + expand(u - prediction.t, prediction.x0) * prediction.velocity


def heun_step(denoise: Denoise, prediction: Prediction, u: Tensor | None) -> Tensor:
    """EDM's second-order step: DDIM to ``u``, one more call of ``denoise(x_u, u)`` there, and the mean of both slopes.

    First order, without the call, where there is no noise left at u (the slope is 0/0); first order where there is no signal
    at t (r is infinite and so is the trapezoid's base).
    """
    x = ddim_step(prediction, u)
    process, t = prediction.process, prediction.t
    if u is None:
        return x
    noisy = process.sigma(u) > 0
    if not (noisy.is_meta or noisy.any()):
        return x
    gain = process.alpha(u) * (process.nsr(t) / process.nsr(u) - 1) / 2
    defined = noisy & (process.alpha(t) > 1e-8 * process.sigma(t))
    return x + expand(torch.where(defined, gain, 0), x) * (denoise(x, u).x0 - prediction.x0)


def dpmpp_2m_step(prediction: Prediction, previous: Prediction | None, u: Tensor | None) -> Tensor:
    """DPM-Solver++(2M): second order from the ``previous`` step's prediction, at no further call.

    First order without one, and where there is no noise left at u (lambda is infinite), as in diffusers.
    """
    x = ddim_step(prediction, u)
    if u is None or previous is None:
        return x
    process = prediction.process
    at_last, at_t, at_u = (process.log_snr(time) for time in (previous.t, prediction.t, u))
    gain = process.alpha(u) * (1 - (at_t - at_u).exp()) * (at_u - at_t) / (2 * (at_t - at_last))
    return x + expand(torch.where(process.sigma(u) > 0, gain, 0), x) * (prediction.x0 - previous.x0)


def sample(
    denoise: Denoise,
    x: Tensor,
    times: Times,
    step: Callable[[Prediction, Tensor | None], Tensor] = ddim_step,
) -> Tensor:
    """x0 from the state ``x`` [B, ...] at times[0], through the decreasing ``times`` to the end of the path.

    A start from pure noise is ``process.initial_scale`` times unit noise. A list of integers is of table rows; of other numbers,
    of float64 times.

    >>> from functools import partial
    >>> from fastdiff.diffusion import GaussianMixture
    >>> from fastdiff.diffusion.process import EDM
    >>> ring = GaussianMixture.ring(EDM())
    >>> sample(ring, torch.tensor([[80.0, 8.0]]), [80.0, 9.0, 3.0, 1.0, 0.3], partial(heun_step, ring))
    tensor([[2.0643, 0.0100]])
    """
    if not isinstance(times, Tensor):
        times = torch.tensor(times, dtype=torch.int64 if all(isinstance(t, int) for t in times) else torch.float64)
    grid = [t.expand(len(x)) for t in times.to(x.device)]
    for t, u in zip(grid, [*grid[1:], None], strict=True):
        x = step(denoise(x, t), u)
    return x


def ddim_sample(denoise: Denoise, noise: Tensor, times: Times) -> Tensor:
    """Run DDIM from ``noise`` [B, ...] at times[0] through the decreasing ``times`` to x0. ``denoise(x_t, t)``, t [B]."""
    return sample(denoise, noise, times)


def dpmpp_2m_sample(denoise: Denoise, noise: Tensor, times: Times) -> Tensor:
    """``ddim_sample`` with DPM-Solver++(2M): the same number of calls, second order."""
    previous: Prediction | None = None

    def step(prediction: Prediction, u: Tensor | None) -> Tensor:
        nonlocal previous
        x, previous = dpmpp_2m_step(prediction, previous, u), prediction
        return x

    return sample(denoise, noise, times, step)


#: Whole trajectories by name: what a method's option chooses from.
SOLVERS: dict[str, Callable[[Denoise, Tensor, Times], Tensor]] = {"ddim": ddim_sample, "dpmpp_2m": dpmpp_2m_sample}


def trailing_times(num_train_timesteps: int, num_steps: int) -> list[int]:
    """diffusers' trailing grid: ``round(T - k T / n) - 1`` for k = 0..n-1, so the first time is always T - 1.

    In numpy's arithmetic, as diffusers has it: halves fall as its accumulated float steps let them fall. (For some n, such as
    61, those add one step in diffusers; not here.) Where n does not divide T, its ``DDIMScheduler`` steps to ``t - T // n``,
    which need not be the next time of this grid.

    >>> trailing_times(1000, 4)
    [999, 749, 499, 249]
    """
    grid = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)).astype(np.int64)[:num_steps] - 1
    times: list[int] = grid.tolist()
    return times


def leading_times(num_train_timesteps: int, num_steps: int, *, steps_offset: int = 0) -> list[int]:
    """diffusers' leading grid, ``k (T // n) + steps_offset`` falling: it never starts from pure noise.

    DPMSolverMultistep's is ``leading_times(T, n + 1, ...)[:-1]``.

    >>> leading_times(1000, 4, steps_offset=1)
    [751, 501, 251, 1]
    """
    ratio = num_train_timesteps // num_steps
    return [k * ratio + steps_offset for k in reversed(range(num_steps))]


def linspace_times(num_train_timesteps: int, num_steps: int) -> list[int]:
    """diffusers' linspace grid: n rounded times from T - 1 to 0, both included; a single one is 0.

    DPMSolverMultistep's is ``linspace_times(T, n + 1)[:-1]``; EulerDiscrete's is not rounded.

    >>> linspace_times(1000, 4)
    [999, 666, 333, 0]
    """
    times: list[int] = np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1].astype(np.int64).tolist()
    return times


def lcm_times(num_steps: int, original_steps: int = 50, num_train_timesteps: int = 1000) -> list[int]:
    """The grid of LCMScheduler and TCDScheduler: n of the ``original_steps`` times that the student was distilled on.

    Raises:
        ValueError: more steps than the student has times.

    >>> lcm_times(4)
    [999, 759, 499, 259]
    """
    if not 0 < num_steps <= original_steps <= num_train_timesteps:
        raise ValueError(
            f"{num_steps} steps out of {original_steps} of {num_train_timesteps} times: the grid would repeat or skip times. "
            "Need 0 < num_steps <= original_steps <= num_train_timesteps."
        )
    trained = [k * (num_train_timesteps // original_steps) - 1 for k in range(original_steps, 0, -1)]
    return [trained[int(i)] for i in np.floor(np.linspace(0, original_steps, num_steps, endpoint=False))]
