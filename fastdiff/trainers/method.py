"""``Method``: a published algorithm as a dataclass, its hyper-parameters as documented fields.

It says which roles it needs, which updates an iteration makes, how often they run each role, what each update minimises, how the
student samples, and on which laws it is proved. The engine does the rest and knows no loss. A new method is one file with one
subclass:

>>> @dataclass(kw_only=True)
... class MyMethod(Method):
...     info = Paper(title="...", venue="...", year=2026, arxiv="...", sheet="...")
...     def roles(self): return {"student": Role(train="full", lr=1e-4)}
...     def updates(self, step): return ("student",)
...     def calls(self, updates): return {"student": Calls(1, 1)}
...     def loss(self, update, batch, roles): return {"term": scalar}
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.errors import UserError
from fastdiff.models.condition import repeat
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from."""

    title: str
    venue: str
    year: int
    arxiv: str
    sheet: str


@dataclass(frozen=True)
class Calls:
    """Forward passes and backward passes (to weights or only to the input) of one role, per sample of the batch."""

    forward: int
    backward: int

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a method is proved on a law in closed form: its settings there, and what it must reach. See ``fastdiff certify``."""

    fields: Mapping[str, Any]
    """Settings of the method; guidance off, since a guided score is no law's."""
    bounds: Mapping[str, float]
    """The largest value of each metric that passes."""
    max_steps: int
    batch_size: int = 512
    ema_decay: float = 0.99


@dataclass
class Batch:
    """What a loss gets: draws for its samples, their conditions, and what earlier updates of the iteration left."""

    draws: Draws
    prompts: PromptTable
    teacher: Teacher
    memo: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def cond(self) -> Any:
        """Conditions of prompts drawn uniformly, the same whenever they are asked for in one iteration."""
        if "cond" not in self.memo:
            index = self.draws.integers("prompts", 0, self.prompts.drawable)
            self.memo["cond"] = self.prompts.conditions(self.prompts.rows(index))
        return self.memo["cond"]

    @property
    def null(self) -> Any:
        """Conditions of the empty prompt."""
        return repeat(self.teacher.null, len(self))

    def noise(self, name: str) -> Tensor:
        """Fresh standard normal latents."""
        return self.draws.normal(name, self.teacher.latent_shape)

    def times(self, name: str, low: int, high: int) -> Tensor:
        """Times t uniform on low..high inclusive, one per sample."""
        return self.draws.integers(name, low, high + 1)


@dataclass(frozen=True)
class Preparation:
    """What a method may use before the first step: see ``Method.prepare``."""

    teacher: Teacher
    prompts: PromptTable
    folder: Path
    seed: int
    rank: int
    world_size: int
    progress: Callable[[str, int], Callable[[int], None]]
    """``progress(label, total)`` gives a function to be told how much was done since its last call."""


@dataclass(frozen=True)
class Prepared:
    """What ``Method.prepare`` costs a process: see ``Method.prepare_blank``."""

    tensors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """What is kept in the host's memory, by a name that people read."""
    calls: Mapping[str, Calls] = field(default_factory=dict)
    """Network calls of each role, in samples."""


@dataclass(kw_only=True)
class Method(ABC):
    """A distillation algorithm; see the module docstring."""

    info: ClassVar[Paper]
    trials: ClassVar[Mapping[str, Trial]] = {}
    """The laws this method must recover, by their names in ``fastdiff.proof.laws``."""
    bf16_tolerance: ClassVar[tuple[float, float]] = (0.05, 0.2)
    """How far, relatively, the terms and the gradients of one update in bf16 autocast may be from float32: where two near scores
    are subtracted, rounding shows."""
    fixed_point: ClassVar[str] = ""
    """The update whose gradient is zero where the student has the teacher's law and all scores are exact and unguided."""

    @classmethod
    def name(cls) -> str:
        """The name in commands: ``SwiftBrush`` is ``swiftbrush``, ``ODEPairs`` is ``ode-pairs``."""
        return re.sub(r"(?<=[A-Z])(?=[A-Z][a-z]{2})|(?<=[a-z])(?=[A-Z][A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """The networks this method needs; one of them is ``student``."""

    @abstractmethod
    def updates(self, step: int) -> tuple[str, ...]:
        """The updates of iteration ``step``, in order."""

    def trains(self, update: str) -> tuple[str, ...]:
        """The roles that an update trains; by default the one it is named after."""
        return (update,)

    @abstractmethod
    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Named scalar terms; their sum is minimised over ``trains(update)``."""

    @abstractmethod
    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        """How often an iteration that makes ``updates`` runs each role, per sample of the batch. The ledger is held to it."""

    def lr_of(self, role: str, step: int) -> float:
        """Learning rate of a role before the engine's warm-up and decay."""
        return self.roles()[role].lr

    def prepare(self, preparation: Preparation) -> None:
        """Make or load what the losses need besides prompts. Called once, before the first step."""
        del preparation

    def prepare_blank(self, teacher: Teacher, world_size: int) -> Prepared:
        """For a plan: leave tensors without values (meta device) where ``prepare`` leaves real ones, and say what that costs."""
        del teacher, world_size
        return Prepared()

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        """The times that losses draw, both ends included, by the name of the draw; ``times`` draws what is declared here."""
        del teacher
        return {}

    def times(self, name: str, batch: Batch) -> Tensor:
        """Times t uniform on ``noise_range(teacher)[name]``, one per sample."""
        return batch.times(name, *self.noise_range(batch.teacher)[name])

    def timesteps(self, teacher: Teacher) -> list[int]:
        """The times at which the student is called to make a sample."""
        return [last_time(teacher.process)]

    def validate(self, teacher: Teacher) -> None:
        """Refuse, with the reason, a teacher this method cannot use."""
        del teacher

    def sample(self, student: Denoiser, noise: Tensor, cond: Any) -> Tensor:
        """One call at the largest time: ``x0 = (z - sigma_T eps(z, T)) / alpha_T`` for an eps-network."""
        return one_step(student, noise, cond)


def one_step(student: Denoiser, noise: Tensor, cond: Any) -> Tensor:
    """``x0`` [B, C, h, w] of one network call at t = T from ``noise``."""
    t = torch.full((len(noise),), last_time(student.process), device=noise.device)
    return student(noise, t, cond).x0


def last_time(process: NoiseProcess) -> int:
    """T, where a one-step student starts."""
    return int(process.t_max)


def needs_thousand_times(teacher: Teacher) -> None:
    """Refuse a teacher whose times are not 0..999: the papers' range 20..980 would be another share of its path."""
    if int(teacher.process.t_max) != 999:
        raise UserError(f"{teacher.name} has times 0..{int(teacher.process.t_max)}; this method draws t from 20..980 of 0..999.")


def needs_bottleneck(teacher: Teacher) -> None:
    """Refuse a teacher whose network has no place for a discriminator to look at."""
    try:
        teacher.family.bottleneck(teacher.family.backbone)
    except NotImplementedError as error:
        raise UserError(f"{teacher.name}: {error} Turn this method's GAN term off, or take another teacher.") from error


def due(step: int, ratio: tuple[int, int]) -> bool:
    """Whether the rarer update happens in iteration ``step``: ``a`` times in every ``b`` iterations, first at step 0.

    >>> [due(step, (2, 5)) for step in range(5)]
    [True, False, True, False, False]
    """
    rarer, common = ratio
    return (step * rarer) % common < rarer
