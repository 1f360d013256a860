"""The engine's options, shared by all methods."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdiff.errors import UserError

_CHOICES = {"mixed_precision": ("no", "bf16"), "lr_schedule": ("constant", "linear", "cosine")}


@dataclass(kw_only=True)
class Config:
    """How to run, whatever the method."""

    output_dir: Path = Path("runs/student")
    """Where the student, its checkpoints, logs and pictures go."""
    max_steps: int = 1000
    """Iterations; one iteration makes the updates its method asks for."""
    batch_size: int = 64
    """Samples per micro-batch and process."""
    accumulation: int = 1
    """Micro-batches per update."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of network calls; weights, losses and optimiser stay float32."""
    max_grad_norm: float = 1.0
    """Clip the gradient norm of each update to this."""
    warmup_steps: int = 50
    """Iterations over which learning rates rise linearly from 0."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rates after the warm-up: kept, or brought to 0 at max_steps."""
    ema_decay: float = 0.995
    """Exponential moving average of the student, which is what gets exported; 0 turns it off."""
    seed: int = 0
    """Everything random derives from it, with the rank and the step."""
    save_every: int = 500
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    validate_every: int = 250
    """Iterations between pictures of the student on fixed noise; 0 turns them off."""
    log_every: int = 10
    """Iterations between lines of log.jsonl."""
    max_bad_steps: int = 10
    """Stop when more than so many updates of one kind in a row have no finite gradient; each is skipped and reported."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate, such as tensorboard."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir, to the bit."""

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        for name in ("max_steps", "batch_size", "accumulation", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        for name in ("warmup_steps", "validate_every", "max_bad_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative.")
        if not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: it must be above 0; 0 would clip every gradient to nothing.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: it must be in [0, 1); 1 would never learn.")

    @classmethod
    def of(cls, **options: Any) -> "Config":
        """A config from keywords; an unknown one is an error that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                raise UserError(f"no option {name!r}: it would have been ignored.{hint}")
        return cls(**options)

    def lr_factor(self, step: int) -> float:
        """What learning rates are multiplied with in iteration ``step``."""
        import math

        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1)
        if self.lr_schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.lr_schedule == "cosine" else 1.0


#: Options that may change between a run and its continuation without changing what it computes.
FREE_ON_RESUME = frozenset(
    {"output_dir", "save_every", "keep_checkpoints", "validate_every", "log_every", "max_bad_steps", "trackers", "resume"}
)
