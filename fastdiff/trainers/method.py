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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.models.condition import repeat
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule, export_student
from fastdiff.pipelines.flow import schedule_of
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.trajectory import Generators, Sampler, own_generators, own_noise, trajectory


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
    law: str = ""
    """The law, where the trial's own name says more than that."""
    batch_size: int = 512
    ema_decay: float = 0.99


@dataclass
class Batch:
    """What a loss gets: draws for its samples, their conditions, and what earlier updates of the iteration left."""

    draws: Draws
    prompts: PromptTable
    teacher: Teacher
    memo: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    """What the micro-batches of one iteration leave each other: one dict for all of them."""

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def cond(self) -> Any:
        """Conditions of prompts drawn uniformly, the same whenever they are asked for in one iteration."""
        if "cond" not in self.memo:
            self.memo["cond"] = self.prompts.conditions(self.prompt_index)
        return self.memo["cond"]

    @property
    def prompt_index(self) -> Tensor:
        """Which prompts those are [B]."""
        return self.prompts.rows(self.draws.integers("prompts", 0, self.prompts.drawable))

    @property
    def null(self) -> Any:
        """Conditions of the empty prompt."""
        return repeat(self.teacher.null, len(self))

    def noise(self, name: str) -> Tensor:
        """Fresh standard normal latents."""
        return self.draws.normal(name, self.teacher.latent_shape)

    def times(self, name: str, low: int | Tensor, high: int | Tensor) -> Tensor:
        """Times of levels uniform on low..high inclusive, one per sample; the ends are levels 0..999, or one a sample, [B]."""
        return self.teacher.process.at_level(self.levels(name, low, high))

    def levels(self, name: str, low: int | Tensor, high: int | Tensor) -> Tensor:
        """The levels [B] of ``times``: the same whenever they are asked for in one iteration."""
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return (low + self.draws.uniform(name) * (high + 1 - low)).floor()
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
    max_steps: int
    progress: Callable[[str, int], Callable[[int], None]]
    """``progress(label, total)`` gives a function to be told how much was done since its last call."""
    say: Callable[[str], None] = print
    """Tells the user a line."""


@dataclass(frozen=True)
class Prepared:
    """What ``Method.prepare`` costs a process: see ``Method.prepare_blank``."""

    tensors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """What is kept in the host's memory, by a name that people read."""
    calls: Mapping[str, Calls] = field(default_factory=dict)
    """Network calls of each role, in samples."""


@dataclass(frozen=True)
class Finished:
    """What ``Method.deliver`` gets: the trained network of the student and where its product goes."""

    teacher: Teacher
    network: nn.Module
    folder: Path
    note: Mapping[str, Any]
    """For ``fastdiff.json``."""
    prompts: list[str]
    noise: Tensor
    """Prompts and noise for the samples by which what was written is compared with what was trained."""
    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    """The student's LoRA weights: see ``Roles.adapter``."""


@dataclass(frozen=True)
class Delivered:
    """What the end of a training wrote and verified."""

    product: Any
    """What ``Trainer.train`` returns."""
    images: Tensor
    """The trained student's, shown as ``validation/final.png``."""
    reader: str
    """Who read back what was written."""
    difference: float
    """Largest difference between those images and the reader's."""


@dataclass(kw_only=True)
class Method(ABC):
    """A distillation algorithm; see the module docstring."""

    info: ClassVar[Paper]
    trials: ClassVar[Mapping[str, Trial]] = {}
    """What this method must recover, by the names of laws in ``fastdiff.proof.laws``, or by names of its own."""
    bf16_tolerance: ClassVar[tuple[float, float]] = (0.05, 0.2)
    """How far, relatively, the terms and the gradients of one update in bf16 autocast may be from float32: where two near scores
    are subtracted, rounding shows."""
    sampler: ClassVar[Sampler] = "ddim"
    """How the student goes from one level to the next: deterministically, or by noising x0 anew ("consistency")."""
    delivers: ClassVar[Literal["pipeline", "scenes"]] = "pipeline"
    """What a training ends with: a network that samples, or the particles of ``fastdiff.models.scenes``."""
    fixed_point: ClassVar[str] = ""
    """The update whose gradient is zero where the student has the teacher's law and all scores are exact and unguided."""
    fixed_point_fields: ClassVar[Mapping[str, Any]] = {}
    """Settings under which that law can be stated, besides those of the first trial."""

    def __post_init__(self) -> None:  # noqa: B027 (no method has to refuse anything)
        """Refuse settings that no run could mean."""

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
        """The roles that an update trains; by default the one it is named after. One that trains none runs without gradient."""
        return (update,)

    @abstractmethod
    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Named scalar terms; their sum is minimised over ``trains(update)``."""

    def restarts(self, step: int) -> tuple[str, ...]:
        """Roles that go on from their average, with a new optimiser and a new average, from iteration ``step`` on."""
        del step
        return ()

    def begin(self, step: int, roles: Roles) -> None:
        """What precedes iteration ``step``, after ``restarts``."""
        del step, roles

    def after(self, update: str, roles: Roles) -> None:
        """What follows the optimisers' steps of an update, besides them."""
        del update, roles

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
        """The levels (0..999, see ``NoiseProcess.at_level``) that losses draw, both ends included, by the name of the draw."""
        del teacher
        return {}

    def times(self, name: str, batch: Batch) -> Tensor:
        """Times t uniform on ``noise_range(teacher)[name]``, one per sample."""
        return batch.times(name, *self.noise_range(batch.teacher)[name])

    def levels(self) -> list[int]:
        """The levels at which the student is called to make a sample, falling."""
        return [LEVELS - 1]

    def timesteps(self, teacher: Teacher) -> list[int] | list[float]:
        """The times of ``levels``."""
        times: list[int] | list[float] = teacher.process.at_level(torch.tensor(self.levels())).tolist()
        return times

    def schedule(self, teacher: Teacher) -> Schedule:
        """What the exported pipeline must do."""
        return schedule_of(teacher, self.timesteps(teacher), self.sampler)

    def note(self, teacher: Teacher) -> dict[str, Any]:
        """What ``fastdiff.json`` of the exported folder says of how it is called."""
        schedule = self.schedule(teacher)
        return {
            "method": self.name(),
            "teacher": teacher.name,
            "num_inference_steps": len(schedule.times),
            "timesteps": schedule.times,
            "guidance_scale": schedule.guidance_scale or 1.0,
            "guidance_range": schedule.guidance_range,
            "call": schedule.call,
        }

    def validate(self, teacher: Teacher) -> None:
        """Refuse, with the reason, a teacher this method cannot use."""
        del teacher

    def check_length(self, max_steps: int) -> None:
        """Refuse, with the number it needs, a run that is too short for this method's stages."""
        del max_steps

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        """x0 [B, ...] from unit noise [B, ...]: one call a level, with ``sampler`` between them.

        Args:
            generators: where a stochastic sampler draws its noise, one or one a sample; not needed for one step.
        """
        return trajectory(student, noise, cond, self.levels(), self.sampler, generators)[-1].x0

    def teacher_guidance(self) -> float:
        """The guidance scale of the teacher that the student is to equal."""
        return float(getattr(self, "guidance_scale", 1.0))

    def signals(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Signals of ``_monitors`` that the latest loss terms tell."""
        del terms
        return {}

    def preview(self, roles: Roles, prompts: list[str], noise: Tensor) -> Tensor:
        """Images of the student in the middle of a training."""
        cond = roles.teacher.encode(prompts)
        return roles.teacher.decode(self.sample(roles.denoiser("student"), noise, cond, own_generators(len(noise))))

    def draw(self, network: nn.Module, teacher: Teacher, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        """Samples of a trained student, one a noise."""
        student = Denoiser(teacher.family.network(network), teacher.process, teacher.prediction_type)
        return self.sample(student, noise, cond, generators)

    def deliver(self, finished: Finished) -> Delivered:
        """Write what the training was for, read it back and compare."""
        teacher, network, prompts, noise = finished.teacher, finished.network, finished.prompts, finished.noise
        if not teacher.family.takes_latents:
            noise = own_noise(noise)
        with torch.no_grad():
            images = teacher.decode(self.draw(network, teacher, noise, teacher.encode(prompts), own_generators(len(noise))))

        def sample(student: Denoiser, noise: Tensor, cond: Any) -> Tensor:
            return self.sample(student, noise, cond, own_generators(len(noise)))

        product, difference = export_student(
            teacher, network, finished.folder, finished.note, self.schedule(teacher), prompts, noise, images, sample
        )
        reader = "plain diffusers" if teacher.pipeline is not None else "a reloaded network"
        return Delivered(product, images, reader, difference)


def one_step(student: Denoiser, noise: Tensor, cond: Any) -> Tensor:
    """``x0`` [B, ...] of one network call at the largest time from unit noise: ``x0 = (z - sigma_T eps(z, T)) / alpha_T``."""
    return trajectory(student, noise, cond, [LEVELS - 1], "ddim")[-1].x0


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
