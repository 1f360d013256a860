"""Short runs of a method on a tiny teacher, what they are watched with, and the variants that test files of methods list."""

import dataclasses
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_teacher
from torch import Tensor

import fastdiff.trainers
from fastdiff import Trainer
from fastdiff.data.fashion import captions
from fastdiff.models.condition import concat
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import checkpoint
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Method, Preparation

METHODS: list[type[Method]] = [getattr(fastdiff.trainers, name) for name in fastdiff.trainers.__all__]
_OPTIONS = {"max_steps": 9, "batch_size": 4, "validate_every": 0, "warmup_steps": 2, "log_every": 1, "max_grad_norm": 1e9}


def variants_of(method: type[Method]) -> dict[str, Method]:
    """``VARIANTS`` of the method's own test file, or nothing."""
    stem = method.__module__.rsplit(".", 1)[1]
    path, name = Path(__file__).parent / "trainers" / f"test_{stem}.py", f"variants_of_{stem}"
    if name not in sys.modules and path.exists():
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return getattr(sys.modules.get(name), "VARIANTS", {})


def program(name: str) -> Any:
    """A program of ``eval/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants() -> dict[str, Method]:
    """All variants of all methods: ``"dmd2-full-gan"``. What ``prepare`` leaves on one stays there: run copies."""
    return {f"{method.name()}-{key}": variant for method in METHODS for key, variant in variants_of(method).items()}


def trainer(method: Method, folder: Path, teacher: Teacher | None = None, **options: object) -> Trainer:
    teacher = teacher or tiny_teacher()
    return Trainer(method, teacher, prompts=teacher.prompts or captions()[:8], output_dir=folder, **{**_OPTIONS, **options})


@contextmanager
def started(method: Method, folder: Path, teacher: Teacher | None = None, **options: object) -> Iterator[Trainer]:
    with running(trainer(method, folder, teacher, **options)) as run:
        yield run


@contextmanager
def running(run: Trainer) -> Iterator[Trainer]:
    try:
        run.start()
        yield run
    finally:
        run.close()


def run_to(method: Method, folder: Path, stop: int, **options: object) -> Trainer:
    """A run of ``max_steps`` that is cut off after ``stop`` iterations with a checkpoint."""
    with started(method, folder, **options) as run:
        while run._step < stop:
            run.advance()
        run._save()
    return run


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)[1]


def shake(run: Trainer) -> None:
    """Off the fixed point at which every role is the teacher; an adapter further, for its two factors are multiplied."""
    for name, role in run._roles.specs.items():
        generator, size = torch.Generator().manual_seed(1), 0.2 if role.train == "lora" else 0.02
        for p in run._roles.parameters(name):
            p.data += size * torch.randn(p.shape, generator=generator)


def first_steps(method: Method) -> list[int]:
    """The first step of each set of updates that an iteration makes."""
    found: dict[tuple[str, ...], int] = {}
    for step in range(50):
        found.setdefault(method.updates(step), step)
    return list(found.values())


def updates_of(run: Trainer) -> Iterator[tuple[str, tuple[str, ...], dict[str, Tensor]]]:
    """Every update of every kind of iteration: what it is, whom it trains and its terms; gradients stay until the next one."""
    for step in first_steps(run.method):
        batches = run._micro_batches(step)
        for update in run.method.updates(step):
            trained = run.method.trains(update)
            terms = run._backward(update, batches, trained)
            if not trained:  # it fills a pool
                continue
            run._reduce_and_clip(trained)
            yield f"{step} {update}", trained, terms
            for optimizer in run._optimizers.values():
                optimizer.zero_grad()


def gradients(run: Trainer) -> dict[str, Tensor]:
    """The gradient of every role in every update that trains it, flat; a parameter without one has nan."""
    return {
        f"{key} {name}": torch.cat(
            [torch.full_like(p, torch.nan).flatten() if p.grad is None else p.grad.flatten() for p in run._roles.parameters(name)]
        )
        for key, trained, _ in updates_of(run)
        for name in trained
    }


def distance(a: Tensor, b: Tensor) -> float:
    """Of two gradients, relative to the second; infinite where a parameter has a gradient in one of them only."""
    if not torch.equal(a.isnan(), b.isnan()):
        return torch.inf
    return ((a - b).nan_to_num().norm() / b.nan_to_num().norm()).item()


@dataclass
class Call:
    """One network call: what went in, and the bytes kept for a backward pass that has not used them yet.

    A generator (``Roles.generate``) has inputs of its own: neither x_t nor t nor cond.
    """

    role: str
    x_t: Tensor | None
    t: Tensor | None
    cond: Any
    kept: dict[int, int] = field(default_factory=dict)


@contextmanager
def listening(run: Trainer) -> Iterator[list[Call]]:
    """The network calls that roles make from now on."""
    calls: list[Call] = []
    number = itertools.count()
    network, generate = run._roles.network, run._roles.generate

    def heard(call: Call, function: Any, *inputs: Any) -> Tensor:
        calls.append(call)

        def pack(tensor: Tensor) -> tuple[int, Tensor]:
            index = next(number)
            call.kept[index] = tensor.nbytes
            return index, tensor

        def unpack(packed: tuple[int, Tensor]) -> Tensor:
            call.kept.pop(packed[0], None)
            return packed[1]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(*inputs)

    def heard_network(role: str) -> Any:
        inner = network(role)
        return lambda x_t, t, cond: heard(Call(role, x_t.detach(), t, cond), inner, x_t, t, cond)

    def heard_generator(role: str, *inputs: Any) -> Tensor:
        return heard(Call(role, None, None, None), generate, role, *inputs)

    run._roles.network, run._roles.generate = heard_network, heard_generator
    yield calls
    del run._roles.network, run._roles.generate


class Joined(Draws):
    """The draws of several ranks, one after another, as those of one batch."""

    def __init__(self, ranks: list[Draws]) -> None:
        self._ranks, self.key = ranks, ranks[0].key

    @property
    def ranks(self) -> list[Draws]:
        return self._ranks

    def __len__(self) -> int:
        return sum(map(len, self.ranks))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([draws.normal(name, shape) for draws in self.ranks])

    def uniform(self, name: str) -> Tensor:
        return torch.cat([draws.uniform(name) for draws in self.ranks])

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return torch.cat([draws.integers(name, low, high) for draws in self.ranks])

    def choice(self, name: str) -> float:
        (agreed,) = {draws.choice(name) for draws in self.ranks}
        return agreed


def join_ranks(run: Trainer, world_size: int) -> None:
    """From now on a batch of ``run`` is what ``world_size`` ranks draw, each from its own share of what is stored."""
    size, seed = run.config.batch_size // world_size, run.config.seed

    def micro_batches(step: int) -> list[Batch]:
        draws = [Draws(seed, rank, step, size=size, part=slice(size)) for rank in range(world_size)]
        return [Batch(Joined(draws), run.prompts, run.teacher)]

    run._micro_batches = micro_batches  # type: ignore[method-assign]
    if isinstance(run.method, StoredPairs):
        shares = [dataclasses.replace(run.method) for _ in range(world_size)]
        for rank, share in enumerate(shares):
            share.prepare(
                Preparation(run.teacher, run.prompts, run.folder, seed, rank, world_size, run.config.max_steps, run._log.progress)
            )

        def draw_pairs(batch: Batch, **options: Any) -> tuple[Any, ...]:
            ranks = batch.draws.ranks  # type: ignore[attr-defined]
            parts = [s.draw_pairs(dataclasses.replace(batch, draws=d), **options) for s, d in zip(shares, ranks, strict=True)]
            return tuple(concat(*part) for part in zip(*parts, strict=True))

        run.method.draw_pairs = draw_pairs  # type: ignore[method-assign]


def as_rank(index: int, world_size: int, folder: str) -> None:
    """One of several processes: ``folder/<variant>/rank-<index>.pt`` is what every variant made there, in float64."""
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(world_size))
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1")  # asked for, but not used after a rendezvous by file
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=world_size)
    for name, method in variants().items():
        with started(method, Path(folder) / name, batch_size=4 // world_size, warmup_steps=0) as run:
            assert run.accelerator.num_processes == world_size
            shake(run)
            with listening(run) as calls:
                found = gradients(run)
            run.advance()
            weights = torch.cat([p.detach().flatten() for role in run._optimizers for p in run._roles.parameters(role)])
            inputs = torch.cat([call.x_t for call in calls if call.x_t is not None])
            torch.save({"gradients": found, "inputs": inputs, "weights": weights}, run.folder / f"rank-{index}.pt")
    torch.distributed.destroy_process_group()
