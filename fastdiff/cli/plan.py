"""``fastdiff plan [METHOD]``: what ``fastdiff distill`` with the same options would take, and whether it would start.

Nothing is trained and no weights are read: a teacher of any size is planned from its config files. Exit code 2 says that the
run would be refused; the reasons stand at the end. Most of its seconds are the import of torch and of diffusers' pipeline classes,
which it builds the networks from.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.loading import quiet
from fastdiff.cli.options import columns
from fastdiff.cli.training import Run, run_options

if TYPE_CHECKING:
    from fastdiff.trainers._plan import Plan
    from fastdiff.trainers.method import Calls


@dataclass(kw_only=True)
class Options(Run):
    """What is planned, and for what."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the plan as JSON."""
    gpus: int = 1
    """Processes, one GPU each; batch_size counts for each of them."""
    sharding: Literal["none", "ddp", "fsdp2"] = "none"
    """fsdp2 divides networks over the GPUs (planned only: the engine does not shard yet); else each GPU holds everything."""


def size(n: int) -> str:
    """Bytes for people."""
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def millions(n: int) -> str:
    """Parameters for people."""
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


def of(calls: "dict[str, Calls]") -> str:
    """Calls in words: ``student 1 forward 1 backward``."""
    said = [f"{name} {c.forward:,} forward" + (f" {c.backward:,} backward" if c.backward else "") for name, c in calls.items()]
    return ", ".join(said) or "none"


def lines(plan: "Plan") -> list[str]:
    """The plan as text."""
    several = plan.gpus > 1
    place = f"{plan.gpus} GPUs, sharding {plan.sharding}" if several else "one process"
    batch = f"{plan.batch_size} x {plan.accumulation} samples" + (" each" if several else "")
    return [
        f"{plan.method} on {plan.teacher}: {place}, {batch}, {plan.max_steps:,} iterations",
        "",
        *_roles(plan),
        "",
        *_memory(plan),
        "",
        *_calls(plan),
        "",
        *_facts(plan),
        *(["", "does not fit:", *(f"- {reason}" for reason in plan.refusals)] if plan.refusals else []),
    ]


def _roles(plan: "Plan") -> list[str]:
    several = plan.gpus > 1
    rows = [["role", "trains", "parameters", "trained", "dtype", "weights", "gradients", "optimiser", "average"]]
    for name, role in plan.roles.items():
        sizes = map(size, (role.weights, role.gradients, role.optimizer, role.ema))
        rows.append([name, role.train, millions(role.parameters), millions(role.trainable), role.dtype, *sizes])
    if several:
        for row, last in zip(rows, ["per GPU", *(size(role.per_gpu) for role in plan.roles.values())], strict=True):
            row.append(last)
    return columns(rows)


def _memory(plan: "Plan") -> list[str]:
    rows = [["part", "bytes", "where"], *([name, size(part.bytes), part.where] for name, part in plan.parts.items())]
    updates = [["update", "trains", "gradients", "activations", "exchange"]]
    for name, update in plan.updates.items():
        kept = "unknown" if update.activations is None else f"~{size(update.activations)}"
        updates.append([name, " + ".join(update.trains), size(update.gradients), kept, size(update.exchange)])
    where = "on each GPU" if plan.gpus > 1 else "on the device"
    return [
        *columns(rows),
        "",
        *columns(updates),
        "",
        f"{where}: {size(plan.resident)} throughout, about {size(plan.peak)} in the largest update",
        "~ is an estimate: what autograd keeps of the losses, in float32. "
        "Workspace, allocator and the optimiser's temporaries come on top",
        *(["fsdp2 is planned only: the engine does not shard by itself yet"] if plan.sharding == "fsdp2" else []),
        *(f"unknown: {reason}" for reason in plan.unknown),
    ]


def _calls(plan: "Plan") -> list[str]:
    rows = [f"iteration ({', '.join(kind.updates)}), {kind.count:,} of them: {of(kind.calls)}" for kind in plan.iterations]
    if plan.warm_start.iterations:
        rows.append(f"warm start, {plan.warm_start.iterations:,} iterations: {of(plan.warm_start.calls)}")
    rows.append(f"cycle, {plan.cycle.iterations:,} iteration{'s' * (plan.cycle.iterations > 1)}: {of(plan.cycle.calls)}")
    if plan.prepares:
        rows.append(f"before the first iteration, in samples: {of(plan.prepares)}")
    return ["network calls per sample of the batch", *rows, f"the whole run, in samples: {of(plan.samples)}"]


def _facts(plan: "Plan") -> list[str]:
    drawn = ", ".join(f"{name} {low}..{high}" for name, (low, high) in plan.noise_range.items()) or "none uniformly by level"
    times = ", ".join(map(str, plan.timesteps))
    export: dict[str, Any] = plan.export
    saved = (
        "not possible" if not export else export.get("file") or f"{export['class']} at {', '.join(map(str, export['timesteps']))}"
    )
    return [f"times drawn: {drawn}", f"student called at: {times}", f"exported with: {saved}"]


def run(argv: Sequence[str]) -> int:
    """Print the plan, write it, say whether the run would start."""
    options, config, method, _ = run_options(argv, command="plan", run=Options)
    from fastdiff.files import aside
    from fastdiff.models.teacher import Teacher
    from fastdiff.trainers._plan import plan

    quiet()
    teacher = Teacher.planned(options.teacher, size=options.size)
    planned = plan(method, teacher, config, prompts=options.prompts, gpus=options.gpus, sharding=options.sharding)
    print("\n".join(lines(planned)))
    if options.json:
        with aside(options.json) as part:
            part.write_text(json.dumps(planned.as_json(), indent=2) + "\n", encoding="utf-8")
    if planned.refusals:
        count = len(planned.refusals)
        print(f"fastdiff: this run would be refused for {count} reason{'s' * (count > 1)}, see above.", file=sys.stderr)
    return 2 if planned.refusals else 0
