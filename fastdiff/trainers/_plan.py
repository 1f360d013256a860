"""What a run would take, before it: bytes, network calls, noise, export, and every reason why it would be refused.

Nothing is estimated that can be counted. The roles are the real ``Roles`` on a teacher without values (``Teacher.planned``, the
meta device), the optimiser states those of the real optimisers, calls and times what the method declares and its losses are held
to. Only activations are estimated: the losses run on the meta device, and what autograd keeps until the backward pass is summed,
in float32, with attention that keeps no L x L matrix. Kernels' workspace, the optimiser's temporaries and the allocator's
waste come on top and are not counted.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.data.prompts import PromptTable, read_prompts
from fastdiff.errors import UserError
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import check_exportable
from fastdiff.trainers._activations import Timeless, kept_for_backward, resident
from fastdiff.trainers._checks import check_folder, check_steps, checks
from fastdiff.trainers._counts import cycle, times, total
from fastdiff.trainers.config import Config
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.engine import optimizer_of
from fastdiff.trainers.method import Batch, Calls, Method

Sharding = Literal["none", "ddp", "fsdp2"]
_BEYOND = 1000  # iterations after the last one that are looked at too: a short run may end within its cycle


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """One network. Bytes are those of one process that shards nothing; a LoRA role's are the adapter's alone."""

    train: str
    """full, lora, module, average, lora-average, state, or frozen for the teacher."""
    parameters: int
    """Of the network that computes, for a LoRA role the shared backbone included."""
    trainable: int
    dtype: str
    weights: int
    """Buffers too."""
    gradients: int
    optimizer: int
    ema: int
    per_gpu: int
    """Weights, gradients, optimiser and average on each GPU."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something else that stays in memory, the same on every GPU."""

    bytes: int
    where: Literal["device", "host"]


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """What one update holds beside what stays: first activations (an estimate; None: unknown), later the exchange."""

    trains: list[str]
    gradients: int
    """On each GPU."""
    activations: int | None
    exchange: int
    """The flat buffer of gradients and its copy, with several processes."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Iterations in a row: the updates of each kind of them, and the calls of all together, per sample of the batch."""

    iterations: int
    updates: list[list[str]]
    calls: dict[str, Calls]


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """A kind of iteration: its updates, how many of them the run makes, the calls of one per sample of the batch."""

    updates: list[str]
    count: int
    calls: dict[str, Calls]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module docstring; ``as_json`` has everything."""

    method: str
    teacher: str
    max_steps: int
    batch_size: int
    accumulation: int
    gpus: int
    sharding: Sharding
    roles: dict[str, RolePlan]
    parts: dict[str, Part]
    updates: dict[str, UpdatePlan]
    iterations: list[Iteration]
    warm_start: Stretch
    cycle: Stretch
    prepares: dict[str, Calls]
    """Calls before the first iteration, in samples, of all processes."""
    samples: dict[str, Calls]
    """Calls of all iterations, in samples, of all processes."""
    noise_range: dict[str, tuple[int, int]]
    timesteps: list[int] | list[float]
    export: dict[str, Any]
    """What the student is saved with: ``class``, ``timesteps``; empty where it cannot be saved."""
    refusals: list[str]
    """Why the run would not start."""
    unknown: list[str]
    """What could not be planned, and why."""

    @property
    def resident(self) -> int:
        """Bytes that stay on each GPU from the first to the last iteration; gradients come and go."""
        gradients = sum(self._on_a_gpu(role, role.gradients) for role in self.roles.values())
        parts = sum(part.bytes for part in self.parts.values() if part.where == "device")
        return sum(role.per_gpu for role in self.roles.values()) - gradients + parts

    @property
    def peak(self) -> int:
        """Bytes on each GPU in the largest update, an estimate; without activations where these are unknown."""
        return self.resident + max((u.gradients + max(u.activations or 0, u.exchange) for u in self.updates.values()), default=0)

    def _on_a_gpu(self, role: RolePlan, size: int) -> int:
        return _share(size, self.gpus if shards(role.train, self.sharding) else 1)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        noise = {name: list(ends) for name, ends in self.noise_range.items()}
        return {**asdict(self), "noise_range": noise, "resident": self.resident, "peak": self.peak}


def shards(train: str, sharding: Sharding) -> bool:
    """Whether FSDP2 would divide a role: full copies, and the backbone with its adapters; small modules stay whole."""
    return sharding == "fsdp2" and train not in {"module", "state"}


def plan(
    method: Method,
    teacher: Teacher,
    config: Config,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    gpus: int = 1,
    sharding: Sharding = "none",
) -> Plan:
    """The plan of ``Trainer(method, teacher, prompts=prompts, config=config)`` on ``gpus`` processes.

    Args:
        teacher: from ``Teacher.planned``.
        sharding: "fsdp2" divides what ``shards`` says; the engine does not shard yet, so those bytes are only planned.

    Raises:
        ValueError: the teacher holds values: its copies would too.
    """
    if teacher.device.type != "meta":
        raise ValueError(f"the teacher {teacher.name} is on {teacher.device} and would be copied; plan with Teacher.planned(...).")
    if gpus < 1:
        raise UserError(f"gpus is {gpus}: it must be at least 1.")
    method, refusals = copy.copy(method), list[str]()
    for check in [*checks(method, teacher, config.max_steps), lambda: check_folder(config)]:
        refusals += _refusal(check)
    read: list[str] = []
    refusals += _refusal(lambda: read.extend(read_prompts(prompts, teacher)))
    table = _Prompts(read or [""], teacher)
    prepared = method.prepare_blank(teacher, gpus)
    running = copy.copy(teacher)
    running.process = Timeless(teacher.process)
    with torch.device("meta"):
        roles = Roles(running, method.roles())
    try:
        planned = _roles(roles, config, gpus, sharding)
        updates, unknown = _updates(method, roles, planned, _batches(table, running, config), gpus, sharding)
    finally:
        roles.close()
    run = [method.updates(step) for step in range(config.max_steps + _BEYOND)]
    start, period = cycle(run)
    kinds = Counter(run[: config.max_steps])
    samples = config.batch_size * config.accumulation * gpus
    calls = total((method.calls(kind), count) for kind, count in kinds.items())
    export = _export(method, teacher)
    return Plan(
        method=method.name(),
        teacher=teacher.name,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        gpus=gpus,
        sharding=sharding,
        roles=planned,
        parts=_parts(teacher, table, prepared.tensors),
        updates=updates,
        iterations=[Iteration(updates=list(kind), count=n, calls=method.calls(kind)) for kind, n in kinds.items()],
        warm_start=_stretch(method, run[: min(start, config.max_steps)]),
        cycle=_stretch(method, run[start : start + period]),
        prepares=times(prepared.calls, gpus),
        samples=times(calls, samples),
        noise_range=method.noise_range(teacher),
        timesteps=method.timesteps(teacher),
        export=export,
        refusals=refusals,
        unknown=unknown,
    )


def _refusal(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


# --- bytes --------------------------------------------------------------------------------------------------------------


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _share(size: int, parts: int) -> int:
    return -(-size // parts)


def _roles(roles: Roles, config: Config, gpus: int, sharding: Sharding) -> dict[str, RolePlan]:
    backbone = roles.teacher.family.backbone
    own = [value for name, value in backbone.named_parameters() if ".lora_" not in name]
    shared, found = sum(p.numel() for p in own), {}
    for name in ("teacher", *roles.specs):
        spec = roles.specs.get(name)
        trained = roles.parameters(name) if spec is not None and spec.learns else []
        kept: list[Tensor] = [*trained]
        if spec is not None and spec.adapts:
            kept = list(roles.parameters(name))
            parameters = shared + sum(p.numel() for p in kept)
        else:
            network = roles.backbone(name)
            kept = [*(own if spec is None else list(network.parameters())), *network.buffers()]
            parameters = shared if spec is None else sum(p.numel() for p in network.parameters())
        train = "frozen" if spec is None else spec.train
        sizes = {
            "weights": _bytes(kept),
            "gradients": _bytes(trained),
            "optimizer": 0 if spec is None or not spec.learns else _bytes(_state(optimizer_of(spec, trained))),
            "ema": _bytes(trained) if name == "student" and config.ema_decay else 0,
        }
        split = gpus if shards(train, sharding) else 1
        found[name] = RolePlan(
            train=train,
            parameters=parameters,
            trainable=sum(p.numel() for p in trained),
            dtype=str((trained or kept)[0].dtype).removeprefix("torch."),
            per_gpu=sum(_share(size, split) for size in sizes.values()),
            **sizes,
        )
    return found


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimiser keeps after its first step, made on the meta device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _parts(teacher: Teacher, table: PromptTable, stored: Any) -> dict[str, Part]:
    named = teacher.pipeline.components.items() if teacher.pipeline is not None else ()
    networks = {name: part for name, part in named if isinstance(part, nn.Module) and part is not teacher.family.backbone}
    found = {name: Part(bytes=_bytes([*part.parameters(), *part.buffers()]), where="device") for name, part in networks.items()}
    found["prompt table"] = Part(bytes=table.nbytes, where="device")
    return found | {name: Part(bytes=_bytes(tensors), where="host") for name, tensors in stored.items()}


class _Prompts(PromptTable):
    """A table whose indices have no values: prompts that are not encoded once are all taken to be the first."""

    def conditions(self, index: Tensor) -> Any:
        if self._table is not None:
            return super().conditions(index)
        return self.teacher.encode([self.prompts[0]] * len(index))


def _batches(table: PromptTable, teacher: Teacher, config: Config) -> Callable[[], Batch]:
    """The first micro-batch of an iteration, without values."""
    size = config.batch_size

    def batch() -> Batch:
        return Batch(Draws(config.seed, 0, 0, size=size, part=slice(0, size), device="meta"), table, teacher)

    return batch


def _updates(
    method: Method, roles: Roles, planned: dict[str, RolePlan], batch_of: Callable[[], Batch], gpus: int, sharding: Sharding
) -> tuple[dict[str, UpdatePlan], list[str]]:
    """Each update once, in the first iteration that makes it, after those that come before it there."""
    run = dict.fromkeys(method.updates(step) for step in range(_BEYOND))
    found: dict[str, UpdatePlan] = {}
    unknown: list[str] = []
    activations: int | None
    for kind in sorted(run, key=len, reverse=True):
        batch, activations = batch_of(), 0
        for update in kind:
            trained = method.trains(update)
            roles.train_only(*trained)
            if activations is not None:  # an update needs what those before it left in the batch
                activations, reason = _kept(method, update, batch, roles)
                unknown += reason
            parts = {name: gpus if shards(planned[name].train, sharding) else 1 for name in trained}
            new = UpdatePlan(
                trains=list(trained),
                gradients=sum(_share(planned[name].gradients, n) for name, n in parts.items()),
                activations=activations,
                exchange=sum(2 * planned[name].gradients for name in trained) if gpus > 1 and sharding != "fsdp2" else 0,
            )
            if update not in found or (new.activations or 0) > (found[update].activations or 0):
                found[update] = new
    return found, list(dict.fromkeys(unknown))


def _kept(method: Method, update: str, batch: Batch, roles: Roles) -> tuple[int | None, list[str]]:
    try:
        return kept_for_backward(lambda: method.loss(update, batch, roles), ignore=resident(roles)), []
    except RuntimeError as error:  # a loss that asks for values
        return None, [f"activations of {update}: {' '.join(str(error).split())[:200]}"]


# --- calls --------------------------------------------------------------------------------------------------------------


def _stretch(method: Method, run: Sequence[tuple[str, ...]]) -> Stretch:
    kinds = Counter(run)
    calls = total((method.calls(kind), count) for kind, count in kinds.items())
    return Stretch(iterations=len(run), updates=[list(kind) for kind in kinds], calls=calls)


def _export(method: Method, teacher: Teacher) -> dict[str, Any]:
    if method.delivers == "scenes":
        return {"class": None, "file": "scenes.safetensors"}
    if _refusal(lambda: check_exportable(teacher)) or _refusal(lambda: check_steps(method, teacher)):
        return {}
    if teacher.pipeline is None:
        return {"class": None, "file": "student.safetensors"}
    schedule = method.schedule(teacher)
    kind, scheduler = schedule.parts(teacher)
    return {"pipeline": kind.__name__, "class": type(scheduler).__name__, "timesteps": list(schedule.times), "call": schedule.call}
