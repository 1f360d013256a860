"""A measured choice between the forward derivative and the one-sided difference.

What "error" can mean. The exact derivative is unknown, so estimators are compared: a forward derivative is exact to rounding *if*
every operator has a right one, which central differences check independently, as far as they can tell. They are taken over
relative steps from 1e-2 to 1e-5, and the distance between the closest two neighbours is their own uncertainty ``u``: diffusers
computes time embeddings in float32 even in a float64 network, which holds u near 1e-3 whatever the weights are.

    reference = forward derivative (of a float64 copy where there is one)   if within max(tolerance, u) of a central difference
              = the mean of the two closest central differences             otherwise, and the forward derivative is refused
    error     = |estimate - reference| / |reference|, L2 over the batch, with the best of the steps for a difference

A bare function has no float64 copy: its own forward derivative is then the reference, and the error reported for it is its
distance to the nearest central difference, an upper bound.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastdiff.diffusion.jvp import (
    Function,
    Tensors,
    inner,
    jvp_central,
    jvp_forward,
    jvp_one_sided,
    outside_autocast,
    random_state,
    replay,
    time_step,
)

STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
USELESS = 0.1  # relative error above which an estimate neither confirms nor trains anything
_NO_DERIVATIVE = re.compile("forward AD|forward mode AD|functorch|forward gradient")


@dataclass(frozen=True)
class JVPChoice:
    """The estimator to use and what was measured to choose it; ``print`` it.

    Args:
        name: "jvp" or "one_sided".
        reason: why that one.
        errors: relative errors of "jvp", "central", "one_sided", and of the differences "(float64)" where a copy was measured.
        refused: what could not be used, and why.
        reference: what the errors are relative to.
        step: relative step of the one-sided difference.
        central_step: that of the central one.
    """

    name: str
    reason: str
    errors: dict[str, float]
    refused: dict[str, str]
    reference: str
    step: float
    central_step: float

    def estimate(
        self, function: Function, primals: Tensors, tangents: Tensors, output: Tensor, *, rng: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``J v`` by the chosen estimator, without graph; ``output = f(p)`` and ``rng`` as ``jvp_one_sided`` has them."""
        if self.name == "jvp":
            with replay(random_state(primals) if rng is None else rng):
                return jvp_forward(function, primals, tangents)[1]
        step = time_step(primals, tangents, self.step)
        return jvp_one_sided(function, primals, tangents, output, step=step, rng=rng)

    def __str__(self) -> str:
        step = f" with a step of {self.step:.0e}" if self.name == "one_sided" else ""
        errors = ", ".join(f"{key} {error:.1e}" for key, error in self.errors.items())
        missing = [f"{key} not measured: {reason}" for key, reason in self.refused.items() if key != "jvp"]
        return "\n".join([f"{self.name}{step}: {self.reason}", f"errors against {self.reference}: {errors}", *missing])


def choose_jvp(function: Function | nn.Module, primals: Tensors, tangents: Tensors, *, tolerance: float = 1e-3) -> JVPChoice:
    """Measure the estimators on one batch and choose: jvp where its error is within ``tolerance``, else the one-sided difference.

    A jvp above the tolerance is still kept where the one-sided difference measures worse (weights in bf16).

    Args:
        function: ``function(*primals) -> Tensor``. A module is measured beside a float64 copy, with dropout off: put a network
            that needs conditions into a small module around ``inner(network)``, with the conditions as buffers. Any other
            function is measured as it is.
        primals, tangents: as in ``jvp_forward``, batched, the time last.

    Raises:
        TypeError: the function returns no tensor.
        ValueError: central differences at neighbouring steps differ by more than 10 %, so that they check nothing, or neither
            estimator comes within 10 %.
    """
    if not isinstance(function, nn.Module):
        return _choose(_measure(function, primals, tangents), None, {}, tolerance)
    network, refused = inner(function), {}
    exact = None
    with _evaluating(network):
        own = _measure(network, primals, tangents)
        if any(p.dtype != torch.float64 for p in [*primals, *network.parameters()]):
            wide = [tuple(tensor.double() for tensor in tensors) for tensors in (primals, tangents)]
            try:
                exact = _measure(copy.deepcopy(network).double(), *wide)
            except Exception as error:  # the network itself has just run: sharded, quantised or too large to copy
                refused["float64 copy"] = _line(error)
    return _choose(own, exact, refused, tolerance)


@dataclass(frozen=True)
class _Measured:
    jvp: Tensor | None
    refusal: str
    central: list[Tensor]
    one_sided: list[Tensor]


def _measure(function: Function, primals: Tensors, tangents: Tensors) -> _Measured:
    state, forward, refusal = random_state(primals), None, ""
    with torch.no_grad(), outside_autocast(primals), replay(state):
        output = function(*primals)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the function returned {type(output).__name__}, not a tensor: for a diffusers network, take [0] of its output."
            )
        central, one_sided = [], []
        for step in (time_step(primals, tangents, relative) for relative in STEPS):
            with replay(state):
                central.append(jvp_central(function, primals, tangents, step=step).double())
            one_sided.append(jvp_one_sided(function, primals, tangents, output, step=step, rng=state).double())
    try:
        with replay(state):
            forward = jvp_forward(function, primals, tangents)[1].double()
    except RuntimeError as error:
        if not _NO_DERIVATIVE.search(str(error)):
            raise
        refusal = _line(error)
    return _Measured(forward, refusal, central, one_sided)


def _choose(own: _Measured, exact: _Measured | None, refused: dict[str, str], tolerance: float) -> JVPChoice:
    best, kind = (own, "") if exact is None else (exact, " of a float64 copy")
    uncertainty, mean = min(((_relative(a, b), (a + b) / 2) for a, b in pairwise(best.central)), key=lambda pair: pair[0])
    if uncertainty > USELESS:
        raise ValueError(
            f"central differences at neighbouring steps differ by {uncertainty:.0%} and confirm no derivative. Pass a module, "
            "which is measured in float64 too, or primals and weights in float32 or better."
        )
    forward = best.jvp if best.jvp is not None else own.jvp
    distance = float("inf") if forward is None else min(_relative(forward, central) for central in best.central)
    confirmed = distance <= max(tolerance, uncertainty)
    if own.jvp is None:
        refused = {"jvp": own.refusal, **refused}
    elif not confirmed:
        wrong = (
            f"{distance:.1e} from the central difference, which is certain to {uncertainty:.1e}: an operator passes a wrong tangent"
        )
        refused = {"jvp": f"{wrong}, or a zero", **refused}
    exactly = best.jvp if confirmed else None
    reference = mean if exactly is None else exactly
    measured = {"jvp": [] if own.jvp is None else [own.jvp], "central": own.central, "one_sided": own.one_sided}
    if exact is not None:
        measured |= {"central (float64)": exact.central, "one_sided (float64)": exact.one_sided}
    errors = {key: min(_relative(value, reference) for value in values) for key, values in measured.items() if values}
    if exact is None and own.jvp is not None:
        errors["jvp"] = distance
    name, reason = _decide(errors, refused, tolerance, by_distance=exact is None)
    if errors[name] > USELESS:
        raise ValueError(f"no estimator comes within {USELESS:.0%} of the derivative: {errors}, {refused}. Use weights in float32.")
    step, central_step = (
        min(zip(values, STEPS, strict=True), key=lambda pair: _relative(pair[0], reference))[1]
        for values in (own.one_sided, own.central)
    )
    source = f"the {'central difference' if exactly is None else 'forward derivative'}{kind}"
    return JVPChoice(name, reason, errors, refused, source, step, central_step)


def _decide(errors: dict[str, float], refused: dict[str, str], tolerance: float, *, by_distance: bool) -> tuple[str, str]:
    if "jvp" in refused:
        return "one_sided", f"jvp was refused, {refused['jvp']}"
    if errors["jvp"] <= tolerance:
        return "jvp", f"its error is within {tolerance:.0e}"
    if by_distance:
        return "jvp", "it is as near to the central difference as that is certain"
    if errors["jvp"] <= errors["one_sided"]:
        return "jvp", f"its error is above {tolerance:.0e}, and that of the one-sided difference is larger"
    return "one_sided", f"jvp's error is above {tolerance:.0e} and larger"


def _relative(value: Tensor, reference: Tensor) -> float:
    difference = (value - reference).norm()
    error = (difference / reference.norm()).item() if difference != 0 else 0.0
    return float("inf") if math.isnan(error) else error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
