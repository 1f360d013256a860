"""What consistency training shares: its data, its grid of times, its boundary, its two passes and how its student samples.

    x_t = a_t x0 + s_t eps,  x0 a stored result of the teacher       f(x_t, t) = x0 of the student, f(x, t_min) = x / a(t_min)

**Data.** The papers have images; here x0 are the teacher's own results (``StoredPairs``), so that prompts are enough.

**Boundary.** The papers write f = c_skip x + c_out F, which is x at t_min whatever F is. Here f is the network's x0 in the
teacher's own parametrisation and the boundary is put in by case, to the bit, where a target falls on the lowest time: what is
exported is the stock pipeline, which knows x0 and no c_skip. No sampler calls the student at t_min, so nothing else would differ
there; as s falls, x0 of an eps, v or flow network is x but for a multiple of s, as in the papers' form.

**Passes.** Student and target see the same noise and, with dropout, the same masks: other masks are noise in the target that no
error reports (Consistency Models, ICML 2023, arXiv 2303.01469).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.jvp import random_state, replay
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, NoiseProcess
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.diffusion.times import from_weights, log_normal_weights
from fastdiff.errors import UserError
from fastdiff.losses import easy_consistency_time
from fastdiff.models.roles import Roles
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.trajectory import Sampler

TARGET = "target"


@dataclass(kw_only=True)
class ConsistencyMethod(StoredPairs):
    """A method whose student says the same x0 all along a trajectory; it samples with fresh noise between its calls."""

    sampler: ClassVar[Sampler] = "consistency"

    steps: int = 4
    """Network calls of the student when it samples."""
    dropout: bool = False
    """Run student and target in train mode, the network's own dropout at work, with the same masks in both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 50:
            raise UserError(f"steps is {self.steps}: expected 1 to 50; beyond that the teacher itself is no slower.")

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)


@dataclass(frozen=True)
class Interval:
    """Times t and earlier times r [B], and rho = sigma / alpha at both; rho_r is 0 where r stands for the end of the path."""

    t: Tensor
    r: Tensor
    rho_t: Tensor
    rho_r: Tensor
    edge: Tensor | float = 0.0
    """rho of the time t' that no t is below; 0 where t is not truncated."""


@dataclass(frozen=True)
class Truncated:
    """rho of the time t' that no t may be below, before it is brought to the process's times, and who has t = t' exactly, [B]."""

    rho: float
    at_edge: Tensor


def falling_grid(process: NoiseProcess, n: int) -> Tensor:
    """The times of ``n`` levels evenly spaced over 999..0, falling; for EDM Karras's grid with rho 7, as in CM.

    On a table two levels may be one row, which is kept once: the finest grid of a table is the table.
    """
    return process.at_level(torch.linspace(LEVELS - 1, 0, n, dtype=torch.float64)).unique_consecutive()


def finite_ratios(process: NoiseProcess, grid: Tensor) -> Tensor:
    """sigma / alpha on a falling grid, float64; where there is no signal, twice the ratio after it in the place of infinity."""
    ratios = process.nsr(grid)
    return torch.where(ratios.isinf(), 2 * ratios.roll(-1), ratios)


def grid_interval(
    process: NoiseProcess,
    n: int,
    u: Tensor,
    log_normal: tuple[float, float] | None = None,
    truncated: Truncated | None = None,
) -> Interval:
    """Two neighbours of ``falling_grid``, by draws u [B] uniform in [0, 1).

    Args:
        log_normal: mean and deviation of ln rho, of which the share in each interval is its chance (iCT); None: all are as likely.
        truncated: t' is the nearest time of the grid that an interval begins at.
    """
    grid = falling_grid(process, n)
    rho = finite_ratios(process, grid)
    weights, edge = torch.ones(len(grid) - 1) if log_normal is None else log_normal_weights(rho, *log_normal), 0.0
    if truncated is None:
        i = from_weights(u, weights)
    else:
        cut = int((rho[:-1].log() - math.log(truncated.rho)).abs().argmin())
        edge = rho[cut].item()
        i = torch.where(truncated.at_edge, cut, from_weights(u, weights[: cut + 1]))
    grid, rho = grid.to(i.device), rho.to(i.device)
    return Interval(grid[i], grid[i + 1], rho[i], rho[i + 1], edge)


def easy_interval(process: NoiseProcess, rho: Tensor, stage: int, easy_map: tuple[float, float, float]) -> Interval:
    """The time of ratio ``rho`` [B], kept within the process's levels, and ECT's earlier time; q, k, b: ``easy_consistency_time``.

    On a table t is the nearest row, and r the nearest to its own ratio that is earlier. A ratio below all levels is 0: the end.
    """
    lowest, highest = process.nsr(process.at_level(torch.tensor([0, LEVELS - 1]))).tolist()
    t = process.t_from_nsr(rho.clamp(lowest, highest))
    rho_t, (q, k, b) = process.nsr(t), easy_map
    rho_r = easy_consistency_time(rho_t, stage, q=q, k=k, b=b)
    ends = rho_r < lowest
    r = process.t_from_nsr(rho_r.clamp(min=lowest))
    if not r.is_floating_point():
        r = torch.minimum(r, t - 1).clamp(min=0)
    rho_r = torch.where(ends, 0.0, process.nsr(r))
    t, r, rho_t, rho_r = (value.to(rho.device) for value in (t, r, rho_t, rho_r))
    return Interval(t, r, rho_t, rho_r)


def with_boundary(prediction: Prediction) -> Tensor:
    """f(x_t, t) [B, ...]: the prediction's x0, and exactly ``x_t / alpha`` at the process's lowest level."""
    process, x_t = prediction.process, prediction.x_t
    lowest = prediction.t <= process.at_level(torch.tensor(0)).to(prediction.t.device)
    return choose(lowest, (x_t / prediction.alpha).to(prediction.x0.dtype), prediction.x0)


def choose(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """``chosen`` [B, ...] in the samples of ``mask`` [B], ``other`` elsewhere."""
    return torch.where(mask.to(other.device).reshape(-1, *[1] * (other.ndim - 1)), chosen, other)


def two_passes(
    roles: Roles, target: str, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], cond: Any
) -> tuple[Prediction, Prediction]:
    """The student at ``start`` (x_t, t) and the role ``target`` at ``end`` (x_r, r), the latter without a graph.

    The second pass repeats the random numbers of the first one, so that their dropout masks are the same. The graded pass comes
    first: in autocast it then makes the weight casts that both use.
    """
    before = random_state(start[:1])
    student = roles.denoiser("student")(*start, cond)
    with torch.no_grad(), replay(before):
        return student, roles.denoiser(target)(*end, cond)
