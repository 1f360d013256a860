"""Straight lines between a state and the end of its trajectory, and how far from straight the paths of a sampler are.

At the flow time ``s = sigma / (alpha + sigma)`` and the scale ``x_s = x_t / (alpha + sigma)`` every process is the rectified flow

    x_s = (1 - s) x0 + s eps,      u = dx_s / ds = eps - x0

and a DDIM step of the process is an Euler step of it, since both keep x0 and eps (derived; ``x_t / alpha`` over ``sigma / alpha``
is the same line once more). So the line from a state x_T to x0 is straight for all processes at once,

    x_t = a_t x0 + s_t eps,      eps = (x_T - a_T x0) / s_T                 which is ddim_step(Prediction(x_T, T, x0, process), t)

and a network of any prediction type meets it in its own process, at the states that a stock DDIM or flow sampler shows it. The
squared error of u is ``|x0' - x0|^2 / s^2``. Rectified flow (ICLR 2023, arXiv 2209.03003).
"""

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, RectifiedFlow, expand
from fastdiff.diffusion.solvers import Denoise, ddim_step, sample


def flow_time(process: NoiseProcess, t: Tensor) -> Tensor:
    """``s = sigma / (alpha + sigma)``, float64: 0 is data, 1 is noise alone."""
    return RectifiedFlow().t_from_nsr(process.nsr(t))


def flow_velocity(prediction: Prediction) -> Tensor:
    """``eps - x0``: the direction that the sampler's next step goes in flow time."""
    return prediction.eps - prediction.x0


def uniform_in_flow_time(process: NoiseProcess, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Times of the process whose flow time is ``high - (high - low) u``, for u [B] in [0, 1): ``low`` itself is not reached.

    On a table they are its nearest rows, so that ``low`` may be.

    Args:
        low, high: flow times, scalars or [B].
    """
    low, high = low.to(u.device), high.to(u.device)
    return process.t_from_nsr(RectifiedFlow().nsr(high - (high - low) * u)).to(u.device)


def flow_weight(process: NoiseProcess, t: Tensor) -> Tensor:
    """``1 / s^2``, float64: what makes the squared error of x0 the squared error of u."""
    return flow_time(process, t).square().reciprocal()


def straightness(denoise: Denoise, x: Tensor, times: Tensor) -> Tensor:
    """How far the sampler's own paths are from straight, [B]: ``mean over s of |u(x_s, s) - (eps - x0)|^2``, summed over elements.

    x0 is where DDIM through the falling ``times`` [K] ends from ``x`` [B, ...], and eps that of the line there. 0 says that every
    number of steps through these times gives the same samples. This is the paper's S (recalled), over the part of [0, 1] that the
    process reaches.
    """
    found: list[Prediction] = []

    def step(prediction: Prediction, u: Tensor | None) -> Tensor:
        found.append(prediction)
        return ddim_step(prediction, u)

    x0 = sample(denoise, x, times, step)
    line = flow_velocity(Prediction(found[0].x_t, found[0].t, x0, found[0].process))
    gaps = torch.stack([(flow_velocity(prediction) - line).flatten(1).square().sum(1) for prediction in found])
    s = torch.cat([flow_time(found[0].process, times), torch.zeros(1, dtype=torch.float64)])
    return (gaps * expand((s[:-1] - s[1:]) / s[0], gaps)).sum(0)
