"""A denoiser as a network of another process, and that with its derivative along a trajectory: what sCM and MeanFlow differentiate.

    F(y, t) = trigflow of the denoiser at the matched state of x_t = sd y,      (y, t) moves along tangents (dy, dt)
    u(x, t) = its velocity under rectified flow, in MeanFlow's case

    forward     torch.func.jvp beside an ordinary forward, or, single call, the forward that the jvp makes anyway
    one-sided   the forward, and one at the state a step behind it
    central     the forward, and two at the states ahead and behind

The change of time and scale is differentiated with the network, which is fed real times. All calls of a step have the same dropout
masks. Derivatives are taken outside autocast; so is the forward, where the estimate is made of its output.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastdiff.diffusion.jvp import (
    Function,
    Tensors,
    jvp_central,
    jvp_forward,
    jvp_one_sided,
    outside_autocast,
    random_state,
    replay,
    time_step,
)
from fastdiff.diffusion.jvp_choice import STEPS, USELESS, JVPChoice, choose_jvp
from fastdiff.diffusion.matching import SNRMatched
from fastdiff.diffusion.process import LEVELS, DiscreteVP, NoiseProcess, TrigFlow
from fastdiff.errors import UserError
from fastdiff.losses import premultiplied_tangents
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.method import Preparation

Name = Literal["forward", "central", "one-sided"]
NAMES: tuple[Name, ...] = get_args(Name)
FORWARDS: dict[str, int] = {"auto": 2, "forward": 2, "one-sided": 2, "central": 3}
"""Forward passes of an update by its estimator; ``auto`` is one of those with two."""
_EDGE = 1e-6  # at the very end of a table the clamp of its inverse has no derivative


def trigflow_network(denoiser: Denoiser, sigma_data: float, cond: Any) -> Function:
    """``F(y [B, ...], t [B])`` with ``y = x_t / sd``: the denoiser seen under ``TrigFlow(sigma_data)``, differentiable in both."""
    matched = SNRMatched(denoiser.continuous(), TrigFlow(sigma_data=sigma_data))
    return lambda y, t: matched(sigma_data * y, t, cond).trigflow


def angles(process: NoiseProcess, sigma_data: float) -> tuple[float, float]:
    """The TrigFlow times of the first and the last training level of ``process``."""
    process = process.continuous() if isinstance(process, DiscreteVP) else process
    r = process.nsr(process.at_level(torch.tensor([0, LEVELS - 1])))
    low, high = TrigFlow(sigma_data=sigma_data).t_from_nsr(r).tolist()
    return low, high


@dataclass(frozen=True)
class Estimator:
    """F at ``primals`` and its derivative along ``tangents``.

    Args:
        name: forward, central or one-sided.
        step: share of the time that a difference moves it by.
        single_call: forward makes one call, whose graph is kept, in the place of two.
    """

    name: Name
    step: float = 0.0
    single_call: bool = False

    def within(self, low: float, high: float) -> tuple[float, float]:
        """The times between ``low`` and ``high`` around which no difference reaches beyond them."""
        behind = 0.0 if self.name == "forward" else self.step
        ahead = self.step if self.name == "central" else 0.0
        return low * (1 + _EDGE) / (1 - behind), high * (1 - _EDGE) / (1 + ahead)

    def __call__(self, network: Function, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """F with its graph, F as the frozen one in the tangent, and the derivative; the last two without graph.

        Raises:
            ValueError: a single call under gradient checkpointing, which could not be recomputed.
        """
        if primals[0].is_meta:  # a plan: no derivative is kept until the backward pass
            output = network(*primals)
            return output, output.detach(), torch.empty_like(output)
        state = random_state(primals)
        if self.single_call:
            output, tangent = jvp_forward(network, primals, tangents, graph=True)
            return output, output.detach(), tangent
        if self.name == "forward":
            with replay(state):
                frozen, tangent = jvp_forward(network, primals, tangents)
            return network(*primals), frozen, tangent
        step = time_step(primals, tangents, self.step)
        if self.name == "central":
            with replay(state):
                tangent = jvp_central(network, primals, tangents, step=step)
            output = network(*primals)
            return output, output.detach(), tangent
        with outside_autocast(primals):
            output = network(*primals)
            tangent = jvp_one_sided(network, primals, tangents, output, step=step, rng=state)
        return output, output.detach(), tangent


@dataclass(frozen=True)
class Seen:
    """What of a denoiser is differentiated, and where.

    Args:
        network: ``network(denoiser, cond)``, a function of a state and its time.
        ends: the first and the last of those times.
        tangents: of (state, time), for a direction like a state and for the times.
    """

    network: Callable[[Denoiser, Any], Function]
    ends: tuple[float, float]
    tangents: Callable[[Tensor, Tensor], Tensors]


def under_trigflow(process: NoiseProcess, sigma_data: float) -> Seen:
    """F of the module docstring, with sCM's tangents."""
    return Seen(
        lambda denoiser, cond: trigflow_network(denoiser, sigma_data, cond),
        angles(process, sigma_data),
        lambda direction, t: premultiplied_tangents(sigma_data * direction, t, sigma_data=sigma_data),
    )


class _Measured(nn.Module):
    """That of the teacher's own network as a module, which ``choose_jvp`` copies in float64: of its parts, the backbone alone."""

    def __init__(self, teacher: Teacher, backbone: nn.Module, seen: Seen, cond: Any) -> None:
        super().__init__()
        self.teacher, self.backbone, self.seen, self.cond = teacher, backbone, seen, cond

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Measured":
        return _Measured(self.teacher, copy.deepcopy(self.backbone, memo), self.seen, self.cond)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        network = self.teacher.family.network(self.backbone)
        denoiser = Denoiser(network, self.teacher.process, self.teacher.prediction_type)
        return self.seen.network(denoiser, _like(self.cond, y))(y, t)


def _like(cond: Any, y: Tensor) -> Any:
    if isinstance(cond, dict):
        return {key: _like(value, y) for key, value in cond.items()}
    return cond.to(y) if cond.is_floating_point() else cond


def choose_estimator(
    preparation: Preparation,
    asked: str,
    seen: Seen,
    *,
    single_call: bool = False,
    backbone: nn.Module | None = None,
    told: Callable[[Any], Any] = lambda cond: cond,
) -> Estimator:
    """The estimator ``asked`` for, or, of ``auto``, the one that ``choose_jvp`` measures to be right; its choice is said aloud.

    Measured once on four samples with the network that the student begins as: the teacher's, or ``backbone``, given ``told(cond)``.

    Raises:
        UserError: the network rounds its times, or the estimator asked for does not give its derivative.
    """
    teacher, prompts = preparation.teacher, preparation.prompts
    generator = torch.Generator().manual_seed(preparation.seed)
    y, direction = (torch.randn(4, *teacher.latent_shape, generator=generator).to(teacher.device) for _ in range(2))
    cond = prompts.conditions(prompts.rows(torch.arange(4) % prompts.drawable))
    _refuse_rounded_times(teacher, y, cond)
    low, high = Estimator("central", step=max(STEPS)).within(*seen.ends)
    t = low + (high - low) * torch.linspace(0.2, 0.95, 4, dtype=torch.float64, device=teacher.device)
    try:
        measured = _Measured(teacher, backbone or teacher.family.backbone, seen, told(cond))
        choice = choose_jvp(measured, (y, t), seen.tangents(direction, t))
    except ValueError as error:
        raise UserError(f"{teacher.name} has no derivative that a student could learn from: {error}") from error
    name = _named(choice, asked, teacher.name)
    preparation.say(f"derivative of the student's network: {name}{'' if asked == 'auto' else ', as asked'}; measured: {choice}")
    step = {"forward": 0.0, "central": choice.central_step, "one-sided": choice.step}[name]
    return Estimator(name, step=step, single_call=single_call)


def _named(choice: JVPChoice, asked: str, teacher: str) -> Name:
    if asked == "auto":
        return "forward" if choice.name == "jvp" else "one-sided"
    name = next(name for name in NAMES if name == asked)
    if name == "forward" and "jvp" in choice.refused:
        raise UserError(
            f"{teacher} has no forward derivative: {choice.refused['jvp']}. The student would learn from a wrong tangent. "
            "Choose jvp=one-sided or central, or auto, which measures."
        )
    error = choice.errors[{"forward": "jvp", "central": "central", "one-sided": "one_sided"}[name]]
    if error > USELESS:
        raise UserError(f"jvp={name} is {error:.0%} off the derivative of {teacher} ({choice}). Choose jvp=auto, which measures.")
    return name


@torch.no_grad()
def _refuse_rounded_times(teacher: Teacher, x_t: Tensor, cond: Any) -> None:
    """A network that rounds its time has no derivative in it, and everything else would look well."""
    if not isinstance(teacher.process, DiscreteVP):
        return
    network = teacher.family.network(teacher.family.backbone)
    rows = torch.linspace(0.2, 0.8, len(x_t), dtype=torch.float64, device=x_t.device).mul(teacher.process.t_max).floor()
    here, near, next_row = (network(x_t, rows + shift, cond) for shift in (0.0, 0.25, 1.0))
    if torch.equal(here, near) and not torch.equal(here, next_row):
        raise UserError(
            f"{teacher.name} gives the same at time t and t + 0.25 and something else at t + 1: it rounds its time, and along the "
            "trajectory its time derivative would be zero. Let its embedding take real times."
        )
