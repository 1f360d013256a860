r"""MeanFlow: a network that gives the mean velocity u(x_t, r, t) = (x_t - x_r) / (t - r) of a path, so that x_r = x_t - (t - r) u.

Differentiating (t - r) u along the path gives u = v - (t - r) du/dt, whose right side is the target:

    L = |u - sg[v - (t - r) du/dt]|^2 / sg[(|.|^2 + c)^p]          du/dt = v . d_x u + d_t u, one JVP

v is the conditional velocity eps - x0 or, in distillation, the teacher's. At r = t it is flow matching. Noise is at t = 1.

Mean Flows for One-step Generative Modeling (NeurIPS 2025, arXiv 2505.13447).
"""

from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.regression import squared_error
from fastdiff.losses.shapes import coefficient, rows


def meanflow_target(velocity: Tensor, jvp: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """``sg[v - (t - r) du/dt]`` [B, ...].

    Args:
        jvp: du/dt of the network, the JVP with tangents (v, 0, 1) for (x_t, r, t).
        t, r: [B], r <= t.
    """
    velocity = widened(velocity)
    return (velocity - coefficient(t - r, velocity) * widened(jvp)).detach()


def adaptive_weight(squared: Tensor, *, p: float = 1.0, c: float = 1e-2) -> Tensor:
    """``sg[(S + c)^-p]``, like S: squared errors [B], each the **sum** over a sample's elements; p = 0 is off."""
    return (widened(squared).detach() + c).pow(-p)


def meanflow(prediction: Tensor, target: Tensor, *, p: float = 1.0, c: float = 1e-2) -> Tensor:
    """``S sg[(S + c)^-p]`` [B] with S = |u - sg target|^2 summed over all but the batch dimension."""
    squared = rows(squared_error(prediction, target.detach())).sum(dim=1)
    return squared * adaptive_weight(squared, p=p, c=c)
