"""Stored ODE pairs: noise and what the teacher's deterministic sampler makes of it, from prompts alone.

``x0 = solver(noise, prompt)`` with guidance, DDIM or DPM-Solver++(2M), on the trailing grid. A file holds the tensors and, in
its header, the settings they were made with: a file made with other settings, or by another teacher, is never reused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.data.prompts import PromptTable, cycled
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, DiscreteVP
from fastdiff.diffusion.solvers import SOLVERS, trailing_times
from fastdiff.errors import UserError
from fastdiff.files import aside
from fastdiff.models.condition import repeat
from fastdiff.models.teacher import Teacher


@dataclass(frozen=True)
class Pairs:
    """``noise`` and ``x0`` [N, C, h, w], float32; ``prompt`` [N], an index into the run's prompts."""

    noise: Tensor
    x0: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def blank(cls, n: int, shape: tuple[int, ...]) -> "Pairs":
        """``n`` pairs without values, on the meta device: a plan needs only their sizes."""
        noise, x0 = (torch.empty(n, *shape, dtype=torch.float32, device="meta") for _ in range(2))
        return cls(noise, x0, torch.empty(n, dtype=torch.long, device="meta"))

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write aside, then rename.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        tensors = {"noise": self.noise, "x0": self.x0, "prompt": self.prompt}
        try:
            with aside(path) as part:
                save_file(tensors, part, metadata={"settings": json.dumps(settings, sort_keys=True)})
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the pairs to {path}: {error}. Free space or choose another --output.") from error

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> "Pairs | None":
        """The pairs of ``path`` if they were made with exactly these settings, else None."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("settings") != json.dumps(settings, sort_keys=True):
                    return None
                return cls(*(file.get_tensor(name) for name in ("noise", "x0", "prompt")))
        except SafetensorError:
            return None


@torch.no_grad()
def make_pairs(
    teacher: Teacher,
    prompts: PromptTable,
    *,
    n: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    solver: str = "ddim",
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> Pairs:
    """``n`` pairs by a solver of ``SOLVERS``; prompts come in shuffled rounds.

    ``progress`` is told how many were made since it was last called.
    """
    rows = int(teacher.process.t_max) + 1 if isinstance(teacher.process, DiscreteVP) else LEVELS
    if num_inference_steps > rows:
        raise UserError(f"pairs of {num_inference_steps} steps, and {teacher.name} has {rows} times: ask for fewer.")
    generator = torch.Generator().manual_seed(seed)
    index = cycled(len(prompts), n, generator)
    noise = torch.randn(n, *teacher.latent_shape, generator=generator)
    times = teacher.process.at_level(torch.tensor(trailing_times(LEVELS, num_inference_steps)))
    scale = teacher.process.initial_scale
    results = []
    for part, z in zip(index.split(batch_size), noise.split(batch_size), strict=True):
        cond, null = prompts.conditions(part), repeat(teacher.null, len(part))

        def denoise(x: Tensor, t: Tensor, cond: Any = cond, null: Any = null) -> Prediction:
            return teacher.denoiser.guided(x, t, cond, null, guidance_scale)

        results.append(SOLVERS[solver](denoise, scale * z.to(teacher.device), times).float().cpu())
        progress(len(part))
    return Pairs(noise, torch.cat(results), index)
