"""Directional derivatives of a network: ``J v = d/dh f(p + h v)`` at h = 0.

For the time derivative along a trajectory p = (x_t, t) and v = (dx/dt, 1), or both multiplied by cos t sin t (sCM, Lu & Song,
ICLR 2025, arXiv 2410.11081). ``f`` takes the differentiated tensors only: integer times and conditions are closed over.

    forward     torch.func.jvp, exact to rounding; 4.4-4.7 forwards on a CPU
    central     (f(p + h v) - f(p - h v)) / 2h + O(h^2), two forwards
    one-sided   (f(p) - f(p - h v)) / h + O(h), one forward beside the f(p) that training has anyway (rCM's semi-continuous step)

Only the math kernel of scaled_dot_product_attention has a forward derivative. An operator registered without one may raise, or
**pass a tangent of zero without a word**: ``choose_jvp`` measures. Everything runs outside autocast, in the dtypes of primals and
weights: in a bf16 autocast UNets fail at the convolution after a GroupNorm, and differences over a step drown in rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.diffusion.process import expand

Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]


def inner(network: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DDP and DataParallel wrappers; FSDP2 modules are their own and stay.

    For derivatives without a graph. A graded call must go through the DDP object itself, or no rank averages its gradients and
    the replicas drift apart without an error; DDP then needs ``broadcast_buffers=False``, since a jvp cannot write into buffers.

    Raises:
        TypeError: FSDP1, whose inner module holds flat shards.
    """
    from torch._dynamo import OptimizedModule
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(network, FullyShardedDataParallel):
            raise TypeError(
                "an FSDP1 module has only flat shards inside: shard with torch's fully_shard (FSDP2), which needs no unwrapping."
            )
        if isinstance(network, OptimizedModule):
            network = network._orig_mod
        elif isinstance(network, DistributedDataParallel | DataParallel):
            network = network.module
        else:
            return network


def math_attention() -> AbstractContextManager[None]:
    """Inside, scaled_dot_product_attention uses the math kernel, the only one with a forward derivative."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def outside_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Autocast off on the devices of ``tensors``, with its cache of weight casts emptied on both sides.

    The casts are emptied because torch once let a graded forward find one made without a graph, and train nothing (not 2.14).
    """
    with ExitStack() as stack:
        for device in {tensor.device.type for tensor in tensors}:
            stack.enter_context(torch.autocast(device, enabled=False))
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def random_state(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """State of the generators that dropout draws from: the CPU's and those of the CUDA devices of ``tensors``."""
    cuda = sorted({str(tensor.device) for tensor in tensors if tensor.is_cuda})
    return {"cpu": torch.get_rng_state(), **{device: torch.cuda.get_rng_state(device) for device in cuda}}


@contextmanager
def replay(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, draws repeat those that followed ``state``; afterwards the generators are as they were before."""
    cuda = [device for device in state if device != "cpu"]
    with torch.random.fork_rng(devices=cuda, device_type="cuda"):
        torch.set_rng_state(state["cpu"])
        for device in cuda:
            torch.cuda.set_rng_state(state[device], device)
        yield


def time_step(primals: Tensors, tangents: Tensors, relative: float = 1e-3) -> Tensor:
    """The h [B], float64, that moves the last primal by ``relative`` of itself and at least by 1e-6.

    The last primal is the time [B] (or a scalar, for a scalar h), or x alone [B, ...] in L2 norm. A diffusers time embedding has
    frequencies up to 1 for t in 0..1000: there 1e-3 is an error of some percent, and 1e-4 or 1e-5 is right.
    """
    size, speed = (p.double().abs() if p.ndim < 2 else p.double().flatten(1).norm(dim=1) for p in (primals[-1], tangents[-1]))
    return (relative * size).clamp(min=1e-6) / torch.where(speed > 0, speed, 1.0)


def jvp_forward(function: Function, primals: Tensors, tangents: Tensors, *, graph: bool = False) -> tuple[Tensor, Tensor]:
    """``f(p)`` and ``J v`` by forward differentiation under the math kernel.

    Args:
        primals, tangents: tensors of equal shapes and dtypes, floating point.
        graph: the single call of a training step: f(p) keeps its graph to the parameters. The tangent never requires gradient.

    Raises:
        ValueError: ``graph`` with gradient checkpointing on in a module that ``function`` is or visibly holds. Its recomputation,
            which has no tangents, would save other tensors than the forward, and torch raises a CheckpointError in the backward.

    >>> output, tangent = jvp_forward(torch.sin, (torch.zeros(2),), (torch.ones(2),))
    >>> tangent
    tensor([1., 1.])
    """
    if graph and any(getattr(module, "gradient_checkpointing", False) for module in _modules(function)):
        raise ValueError(
            "gradient checkpointing is on, and a forward derivative that keeps its graph cannot be recomputed: torch would raise "
            "CheckpointError in the backward. Call disable_gradient_checkpointing(), or keep it and use two calls: "
            "jvp_forward without graph, then an ordinary forward."
        )
    with torch.set_grad_enabled(graph), math_attention(), outside_autocast(primals):
        dual = torch.func.jvp(function, primals, tangents)
    return dual[0], dual[1].detach()


def jvp_central(function: Function, primals: Tensors, tangents: Tensors, *, step: float | Tensor) -> Tensor:
    """``(f(p + h v) - f(p - h v)) / 2h`` without graph, both evaluations with the same dropout masks.

    ``step`` is h, a number or one a sample [B] (``time_step``). Points and quotient are computed in float64 and ``f`` in the
    dtypes of primals and weights: with both in float64 the rounding is 1e-16 / h, in float32 1e-7 / h.
    """
    h = torch.as_tensor(step, dtype=torch.float64)
    with torch.no_grad(), outside_autocast(primals):
        with replay(random_state(primals)):
            ahead = function(*_moved(primals, tangents, h))
        behind = function(*_moved(primals, tangents, -h))
    return _quotient(ahead, behind, 2 * h)


def jvp_one_sided(
    function: Function,
    primals: Tensors,
    tangents: Tensors,
    output: Tensor,
    *,
    step: float | Tensor,
    rng: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``(output - f(p - h v)) / h`` without graph, from the known ``output = f(p)``: one forward more.

    Args:
        output: f(p), computed outside autocast.
        step: h, as in ``jvp_central``.
        rng: ``random_state(primals)`` taken just before ``output`` was computed; needed where ``f`` has dropout.

    Raises:
        ValueError: ``f`` drew random numbers and ``rng`` is missing, or the call is made inside autocast.
    """
    if any(torch.is_autocast_enabled(device) for device in {primal.device.type for primal in primals}):
        raise ValueError(
            "a one-sided difference inside autocast: an output rounded to half precision, divided by the step, is noise. "
            "Compute output and the difference outside autocast."
        )
    before, h = random_state(primals), torch.as_tensor(step, dtype=torch.float64)
    with torch.no_grad(), ExitStack() as stack:
        if rng is not None:
            stack.enter_context(replay(rng))
        behind = function(*_moved(primals, tangents, -h))
    if any(not torch.equal(state, before[device]) for device, state in random_state(primals).items()):
        raise ValueError(
            "the function draws random numbers (dropout in train mode?): output was made with other masks, and their difference "
            "divided by the step would bury the derivative. Pass rng=random_state(primals) taken just before output was computed."
        )
    return _quotient(output, behind, h)


def _moved(primals: Tensors, tangents: Tensors, h: Tensor) -> list[Tensor]:
    pairs = [(p, p.double(), v.double()) for p, v in zip(primals, tangents, strict=True)]
    return [(wide + expand(h, wide) * v).to(p.dtype) for p, wide, v in pairs]


def _quotient(ahead: Tensor, behind: Tensor, h: Tensor) -> Tensor:
    difference = ahead.detach().double() - behind.double()
    return (difference / expand(h, difference)).to(ahead.dtype)


def _modules(function: object, depth: int = 4) -> Iterator[nn.Module]:
    """The modules that a callable is or holds: itself, its closure, the object it is bound to, that object's attributes."""
    if isinstance(function, nn.Module):
        yield from function.modules()
    elif depth and callable(function) and not isinstance(function, type):
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        for held in [getattr(function, "__self__", None), *cells, *getattr(function, "__dict__", {}).values()]:
            yield from _modules(held, depth - 1)
