r"""Continuous-time consistency (sCM): the limit of consistency distillation in TrigFlow.

With x_t = cos t x0 + sin t z, z = sd eps, the network F at (x_t / sd, t), f = cos t x_t - sd sin t F and the trajectory's velocity
v = dx_t/dt (sd F_teacher, or cos t z - sin t x0 without a teacher):

    g = -cos^2 t (sd F - v) - r cos t sin t (x_t + sd dF/dt)         = cos t df/dt at r = 1
    L = e^w (F - sg F - sg N(g))^2 - w                               gradient -2 e^w N(g) dF

N normalises g, w is a learned log weight, r warms up from 0, where L regresses F to v under the weight cos^2 t, to 1. dF/dt is a
JVP; ``premultiplied_tangents`` feeds cos t sin t into it, which keeps it finite in half precision at t = pi / 2.

sCM (ICLR 2025, arXiv 2410.11081), SANA-Sprint (ICCV 2025, arXiv 2503.09641). The discrete form is derived.
"""

import torch
from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import coefficient, rows
from fastdiff.losses.weights import learned_weight


def premultiplied_tangents(velocity: Tensor, t: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Tangents ``(cos t sin t v / sd, cos t sin t)`` [B, ...], [B] for the inputs (x_t / sd, t): the JVP is cos t sin t dF/dt."""
    velocity = widened(velocity)
    speed = t.cos() * t.sin()
    return coefficient(speed, velocity) * velocity / sigma_data, speed


def scm_tangent(
    x_t: Tensor, t: Tensor, prediction: Tensor, velocity: Tensor, jvp: Tensor, *, sigma_data: float, warmup: float = 1.0
) -> Tensor:
    """``g = -cos^2 t (sd F - v) - r (cos t sin t x_t + sd jvp)`` [B, ...].

    Args:
        t: [B], in [0, pi / 2].
        prediction: F at (x_t / sd, t).
        velocity: v = dx_t/dt, guided or not.
        jvp: **cos t sin t** dF/dt, what the JVP gives for ``premultiplied_tangents``.
        warmup: r in [0, 1].
    """
    x_t = widened(x_t)
    cos, sin = coefficient(t.cos(), x_t), coefficient(t.sin(), x_t)
    regression = cos.square() * (sigma_data * widened(prediction) - widened(velocity))
    return -regression - warmup * (cos * sin * x_t + sigma_data * widened(jvp))


def discrete_tangent(
    x_t: Tensor,
    t: Tensor,
    u: Tensor,
    prediction: Tensor,
    prediction_u: Tensor,
    velocity: Tensor,
    *,
    sigma_data: float,
    warmup: float = 1.0,
) -> Tensor:
    """``-cos u (sd F_t - v) - r sin u (x_t + (sd cos(t - u) F_t - sd F_u) / sin(t - u))`` [B, ...], without a JVP.

    At r = 1 it is ``(f_t - f_u) / sin(t - u)`` with F_u taken at the teacher's DDIM step
    ``x_u = cos(t - u) x_t - sin(t - u) v``; cos t times it tends to ``scm_tangent`` as u tends to t, with error O(t - u).

    Args:
        t, u: [B], u < t.
        prediction, prediction_u: F at (x_t / sd, t) and at (x_u / sd, u).
    """
    x_t, prediction = widened(x_t), widened(prediction)
    cos, sin = coefficient(u.cos(), x_t), coefficient(u.sin(), x_t)
    turn, step = coefficient((t - u).cos(), x_t), coefficient((t - u).sin(), x_t)
    change = sigma_data * (turn * prediction - widened(prediction_u)) / step
    return -cos * (sigma_data * prediction - widened(velocity)) - warmup * sin * (x_t + change)


def normalise_tangent(tangent: Tensor, *, kind: str = "norm", c: float = 0.1) -> Tensor:
    """g made of order one per sample, [B, ...].

    ``norm`` is g / (|g| + c) with the L2 norm; ``rms`` is g / (|g| / sqrt(n) + c), in which c means the same at every size;
    ``clip`` bounds each element to [-1, 1]. In few dimensions c damps ``norm``, in many it vanishes beside |g|.

    Raises:
        ValueError: another kind.
    """
    tangent = widened(tangent)
    if kind == "clip":
        return tangent.clamp(-1.0, 1.0)
    if kind not in ("norm", "rms"):
        raise ValueError(f"kind={kind!r}: a tangent is normalised by 'norm', 'rms' or 'clip'.")
    norm = torch.linalg.vector_norm(rows(tangent), dim=1)
    size = norm / tangent[0].numel() ** 0.5 if kind == "rms" else norm
    return tangent / (coefficient(size, tangent) + c)


def inverse_sigma_weight(t: Tensor, *, sigma_data: float) -> Tensor:
    """``1 / (sd tan t)`` [B], a second weight in SANA-Sprint's released code.

    It vanishes at pi / 2, the very time of one-step sampling.
    """
    return 1 / (sigma_data * widened(t).tan())


def scm(prediction: Tensor, tangent: Tensor, *, log_weight: Tensor | float = 0.0, weight: Tensor | float = 1.0) -> Tensor:
    """``e^w weight (F - sg F - sg g)^2 - w``, elementwise [B, ...]; the mean over elements is the paper's e^w |.|^2 / n - w.

    Args:
        prediction: F with gradient; its own value is the frozen F.
        tangent: normalised g.
        log_weight: w, a number or [B], learned.
        weight: a number or [B], such as ``inverse_sigma_weight``.
    """
    prediction = widened(prediction)
    squared = (prediction - prediction.detach() - widened(tangent).detach()).square()
    return learned_weight(coefficient(weight, squared) * squared, torch.as_tensor(log_weight))
