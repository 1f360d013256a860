"""Roles: the named networks of a method, and the one frozen backbone that LoRA roles share.

A ``Role`` says how a network trains (``full``: a copy of the teacher's backbone, or what ``build`` makes in its place; ``lora``:
an adapter on the teacher's own backbone; ``module``: a network of the method's making; ``average`` and ``lora-average``: a copy
or an adapter that no loss trains and that follows another role, ``Roles.follow``; ``state``: a module of buffers alone, which a
method remembers from step to step). ``Roles`` builds them, runs them as denoisers and keeps the ledger.

A switch of adapter changes who computes, never who trains: peft's own ``set_adapter`` moves ``requires_grad`` with the switch
and so drops, without a word, the gradient of a graph built before it. ``train_only`` alone changes ``requires_grad``, once per
update; recomputation under gradient checkpointing runs under the role of its forward.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser, Network
from fastdiff.models.discriminator import features_at, maps_at
from fastdiff.models.law import LawDenoiser
from fastdiff.models.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Role:
    """How one network of a method trains."""

    train: Literal["full", "lora", "module", "average", "lora-average", "state"]
    lr: float = 0.0
    optimizer: Literal["adamw", "radam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    """What Adam adds to the root of its second moment."""
    weight_decay: float = 0.0
    rank: int = 8
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] | None = None
    """Layers to adapt; the family's own where it has none of these names."""
    build: Callable[[Teacher], nn.Module] | None = None
    dropout: bool = False
    """Of a copy: run it in train mode, its dropout at work. The teacher's own backbone never is."""

    @property
    def learns(self) -> bool:
        """Whether an optimiser steps its weights."""
        return self.train not in {"average", "lora-average", "state"}

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter on the teacher's own backbone."""
        return self.train in {"lora", "lora-average"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What roles begin from in the place of the teacher's weights."""

    network: nn.Module | None = None
    """The student's network, such as a smaller one of the teacher's kind; it trains in full, and is copied."""
    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By role, what ``Roles.state`` gave in an earlier run."""

    def hash(self) -> str:
        """SHA-256 of all weights by their names."""
        own = {} if self.network is None else self.network.state_dict()
        digest = hashlib.sha256()
        for name, state in sorted({"": own, **self.weights}.items()):
            for key, value in sorted(state.items()):
                digest.update(f"{name}/{key}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Adapters:
    """The LoRA adapters on one backbone. ``use(name)`` computes with one of them, ``use(None)`` with the bare backbone."""

    def __init__(self, network: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.network = network
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self.active: str | None = None
        self._set(None)

    def _set(self, name: str | None) -> None:
        for layer in self.layers:
            layer._active_adapter = [name or layer._active_adapter[0]]
            layer._disable_adapters = name is None
        self.active = name

    @contextmanager
    def use(self, name: str | None) -> Iterator[Any]:
        before = self.active
        self._set(name)
        try:
            yield self.network
        finally:
            self._set(before)

    def take_off(self, *, merge: str | None = None) -> None:
        """Put the original layers back; ``merge`` adds one adapter to their weights first."""
        for layer in self.layers:
            if merge is not None:
                layer.merge(adapter_names=[merge])
        wrapped = set(map(id, self.layers))
        for parent in list(self.network.modules()):
            for key, child in list(parent.named_children()):
                if id(child) in wrapped:
                    setattr(parent, key, child.get_base_layer())

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their name in the backbone."""
        return {key: value for key, value in self.network.named_parameters() if f".{name}." in key}

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """A checkpointing function whose recomputation uses the adapter of its forward."""
        from torch.utils.checkpoint import checkpoint

        name = self.active

        def again(*inputs: Any) -> Any:
            with self.use(name):
                return function(*inputs)

        return checkpoint(again, *args, use_reentrant=False)


class Roles:
    """The networks of a run: ``roles.denoiser("student")``, and ``"teacher"`` for the frozen one."""

    def __init__(self, teacher: Teacher, specs: dict[str, Role], start: Start | None = None) -> None:
        self.teacher, self.specs = teacher, specs
        self.ledger: Counter[str] = Counter()
        """Samples that went forward through each role, also those that went only to its bottleneck."""
        self.backwards: Counter[str] = Counter()
        """Samples whose gradient went back through each role, to its weights or only to its input."""
        self.modules: dict[str, nn.Module] = {}
        backbone: Any = teacher.family.backbone
        start = start or Start()
        lora = [name for name, role in specs.items() if role.adapts]
        if start.network is not None and "student" in lora:
            raise UserError(
                "the student trains a LoRA adapter on the teacher's backbone: it cannot begin from a network of its own."
            )
        for name, role in specs.items():
            if start.network is not None and (name == "student" or role.train == "average"):
                self.modules[name] = copy.deepcopy(start.network).to(teacher.device)
            elif not role.adapts and role.build is not None:
                self.modules[name] = role.build(teacher).to(teacher.device)
            elif role.train in {"full", "average"}:
                self.modules[name] = copy.deepcopy(backbone).train(role.dropout)
        for name in lora:
            _add_adapter(backbone, name, specs[name], teacher.family.lora_targets)
        self.adapters = Adapters(backbone) if lora else None
        self._parameters = {name: self._find_parameters(name) for name in specs}
        for parameter in (p for parameters in self._parameters.values() for p in parameters.values()):
            if parameter.itemsize < 4:  # a small step on a half-precision weight rounds to nothing
                parameter.data = parameter.data.float()
        for name in start.weights.keys() & specs.keys():
            self.load(name, start.weights[name])
        self.train_only()

    def _find_parameters(self, name: str) -> dict[str, nn.Parameter]:
        if self.specs[name].adapts:
            assert self.adapters is not None
            return self.adapters.parameters(name)
        return dict(self.modules[name].named_parameters())

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of a role that training changes, in a fixed order."""
        return list(self._parameters[name].values())

    @torch.no_grad()
    def follow(self, name: str, leader: str, decay: float) -> None:
        """``average <- decay average + (1 - decay) leader`` for the weights of an average role; buffers are copied.

        Of an adapter the two factors are averaged, not their product; at ``decay`` 0 it becomes its leader's. It begins with
        factors of its own: let it follow once at 0 before anything else.
        """
        for own, other in zip(self.parameters(name), self.parameters(leader), strict=True):
            own.lerp_(other, 1 - decay)
        if self.specs[name].adapts:
            return
        for kept, current in zip(self.modules[name].buffers(), self.modules[leader].buffers(), strict=True):
            kept.copy_(current)

    def train_only(self, *names: str) -> None:
        """Exactly the parameters of ``names`` receive gradient from now on."""
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name in names)

    def network(self, name: str) -> Network:
        """The role as ``(x_t, t, cond) -> output``; every call counts its samples in the ledger."""
        lora = name == "teacher" or self.specs[name].adapts
        backbone = self.teacher.family.backbone if lora else self.modules[name]
        call = self.teacher.family.network(backbone)

        def run(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            self.ledger[name] += len(x_t)
            if lora and name != "teacher" and self.adapters is None:
                raise RuntimeError(f"the adapter of role {name} was taken off: the bare teacher would answer in its place.")
            if lora and self.adapters is not None:
                with self.adapters.use(None if name == "teacher" else name):
                    return call(x_t, t, cond)
            return call(x_t, t, cond)

        return lambda x_t, t, cond: self.watched(name, run(x_t, t, cond))

    def generate(self, name: str, *inputs: Any) -> Tensor:
        """A ``module`` role called with inputs of its own; the ledger counts the samples that it puts out."""
        output: Tensor = self.modules[name](*inputs)
        self.ledger[name] += len(output)
        return self.watched(name, output)

    def watched(self, name: str, output: Tensor) -> Tensor:
        """``output``; the gradient that comes back through it is counted as one of the role's backward passes.

        ``network`` does this itself, but for outputs under ``torch.func.jvp``, which leave their hooks behind.
        """
        if output.requires_grad:
            n = len(output)  # a hook that held the output would keep it, and its graph, for good
            output.register_hook(lambda _: self.backwards.update({name: n}))
        return output

    def features(self, name: str, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """What a role's bottleneck makes of x_t, for a discriminator's head; the layers after it do not run."""
        tapped = self.teacher.family.bottleneck(self.backbone(name))
        network = Denoiser(self.network(name), self.teacher.process, self.teacher.prediction_type)  # also where a law answers
        return self.watched(name, features_at(tapped, lambda: network(x_t, t, cond)))

    def feature_maps(self, name: str, taps: Sequence[int], x_t: Tensor, t: Tensor, cond: Any) -> list[Tensor]:
        """What some of a role's blocks (``Family.blocks``; ``taps`` rise) make of x_t, in one forward that ends with the last.

        The teacher's are its network's also where a law answers in its place.
        """
        blocks = self.teacher.family.blocks(self.backbone(name))
        network = Denoiser(self.network(name), self.teacher.process, self.teacher.prediction_type)
        maps = maps_at([blocks[tap] for tap in taps], lambda: network(x_t, t, cond))
        return [*maps[:-1], self.watched(name, maps[-1])]

    def denoiser(self, name: str) -> Denoiser:
        """The role as a denoiser under the teacher's process and prediction type."""
        if name == "teacher" and self.teacher.law is not None:
            return LawDenoiser(
                self.teacher.law,
                count=lambda n: self.ledger.update({"teacher": n}),
                watch=lambda x0: self.watched("teacher", x0),
            )
        return Denoiser(self.network(name), self.teacher.process, self.teacher.prediction_type)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no role's dropout is at work: for samples that are looked at."""
        at_work = [part for module in self.modules.values() for part in module.modules() if part.training]
        for part in at_work:
            part.training = False
        try:
            yield
        finally:
            for part in at_work:
                part.training = True

    def backbone(self, name: str) -> nn.Module:
        """The network that computes a role; for a LoRA role the shared backbone."""
        return self.modules.get(name, self.teacher.family.backbone)

    def state(self, name: str) -> dict[str, Tensor]:
        """The role's weights (buffers too) for a checkpoint."""
        if self.specs[name].adapts:
            return {key: value.detach() for key, value in self._parameters[name].items()}
        return self.modules[name].state_dict()

    @torch.no_grad()
    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave. Missing or surplus keys raise KeyError."""
        own = self.state(name)
        if own.keys() != state.keys():
            raise KeyError(f"weights of role {name} do not fit: {sorted(own.keys() ^ state.keys())[:3]}")
        for key, value in own.items():
            value.copy_(state[key])

    def adapter(self, name: str) -> dict[str, Tensor]:
        """Copies of a LoRA role's weights, ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``; nothing of other roles."""
        if not self.specs[name].adapts:
            return {}
        return {key.replace(f".{name}.", "."): value.detach().clone() for key, value in self._parameters[name].items()}

    def merged(self, name: str) -> nn.Module:
        """A stock network with the role's weights, its dropout off; a LoRA role is merged into a copy of the backbone."""
        if not self.specs[name].adapts:
            return copy.deepcopy(self.modules[name]).eval()
        network = copy.deepcopy(self.teacher.family.backbone)
        Adapters(network).take_off(merge=name)
        return network

    def close(self) -> None:
        """Take the adapters off the teacher's backbone, which is then what it was before, bit for bit."""
        if self.adapters is not None:
            self.adapters.take_off()
            self.adapters = None


def _add_adapter(backbone: nn.Module, name: str, role: Role, targets: tuple[str, ...]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    names = [key.removesuffix(".base_layer") for key, _ in backbone.named_modules()]
    wanted = [t for t in role.lora_targets or () if any(key == t or key.endswith(f".{t}") for key in names)]
    if not wanted and not targets:
        raise UserError(
            f"{name} trains a LoRA adapter, and the teacher has no linear layers and names no others: pass lora_targets=, "
            "the layers to adapt, to Teacher.from_module, or train the role in full."
        )
    config = LoraConfig(r=role.rank, lora_alpha=role.lora_alpha, target_modules=wanted or list(targets))
    inject_adapter_in_model(config, backbone, adapter_name=name)
    del backbone.peft_config  # peft would warn of a second adapter; ``Adapters`` keeps the count
