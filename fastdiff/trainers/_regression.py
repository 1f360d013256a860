"""What every method that uses stored ODE pairs shares: their settings, their making, and the regression update.

The student repeats, in one call from the same noise, what the teacher's guided deterministic sampler makes of it:

    L = mean pseudo_huber(student(z, T, y), x0(z, y))          (z, y, x0): a stored pair

DMD (arXiv 2311.18828) regresses on such pairs with LPIPS beside its score term, DMD2 (arXiv 2405.14867) uses them to warm up
its one-step student. The pseudo-Huber distance on latents is this library's choice: it needs no feature network.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdiff.data.pairs import Pairs, make_pairs
from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.errors import UserError
from fastdiff.losses import pseudo_huber, reduce
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.method import Batch, Calls, Method, Preparation, Prepared, one_step

REGRESSION = "regression"


@dataclass(kw_only=True)
class StoredPairs(Method):
    """A method that uses stored ODE pairs. They are of all prompts, also where the run is for a part of them."""

    pairs: int = 3000
    """Number of stored ODE pairs."""
    pair_steps: int = 8
    """Teacher steps that make a pair."""
    pair_solver: Literal["ddim", "dpmpp_2m"] = "dpmpp_2m"
    """How the teacher makes a pair: DDIM, or DPM-Solver++(2M), of second order at the same cost."""
    pair_guidance_scale: float = 3.0
    """Guidance of the teacher that makes the pairs; 1 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs", "pair_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.pair_solver not in SOLVERS:
            raise UserError(f"pair_solver is {self.pair_solver!r}: expected {' or '.join(SOLVERS)}.")

    def regresses(self) -> bool:
        """Whether pairs are needed at all."""
        return True

    def teacher_guidance(self) -> float:
        return float(getattr(self, "guidance_scale", self.pair_guidance_scale))

    def prepare(self, preparation: Preparation) -> None:
        self._pairs = load_or_make_pairs(self, preparation) if self.regresses() else None

    def prepare_blank(self, teacher: Teacher, world_size: int) -> Prepared:
        self._pairs = Pairs.blank(self.share(world_size), teacher.latent_shape) if self.regresses() else None
        if self._pairs is None:
            return Prepared()
        forwards = self.share(world_size) * self.pair_steps * (1 if self.pair_guidance_scale == 1 else 2)
        return Prepared({"ODE pairs": (self._pairs.noise, self._pairs.x0, self._pairs.prompt)}, {"teacher": Calls(forwards, 0)})

    def share(self, world_size: int) -> int:
        """Pairs that each of ``world_size`` processes makes."""
        return -(-self.pairs // world_size)

    def draw_pairs(self, batch: Batch, *, own: bool = False, name: str = "pairs") -> tuple[Tensor, Tensor, Tensor]:
        """Noise, result and condition of pairs drawn uniformly; ``own`` are those of the prompts that the student is for."""
        assert self._pairs is not None, "prepare() was not called"
        choice = _of_part(self._pairs, batch.prompts) if own and batch.prompts.part is not None else None
        index = batch.draws.integers(name, 0, len(self._pairs) if choice is None else len(choice))
        device, rows = batch.teacher.device, index.to(self._pairs.prompt.device)
        rows = rows if choice is None else choice[rows]
        cond = batch.prompts.conditions(self._pairs.prompt[rows])
        return self._pairs.noise[rows].to(device), self._pairs.x0[rows].to(device), cond


@dataclass(kw_only=True)
class PairedMethod(StoredPairs):
    """A method that can regress on ODE pairs, as a warm start or altogether."""

    regression_lr: float = 1e-3
    """Student learning rate of the regression update."""
    huber_c: float = 0.1
    """Where the pseudo-Huber distance turns from square to absolute value, in units of latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("huber_c", "regression_lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student",) if update == REGRESSION else super().trains(update)

    def regression(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """The loss of the regression update."""
        noise, x0, cond = self.draw_pairs(batch)
        sample = one_step(roles.denoiser("student"), noise, cond)
        return {"regression": reduce(pseudo_huber(sample, x0, c=self.huber_c))}


def _of_part(pairs: Pairs, prompts: PromptTable) -> Tensor:
    """The rows of the pairs whose prompt is one of the part's."""
    assert prompts.part is not None
    rows = torch.isin(pairs.prompt, prompts.part).nonzero()[:, 0]
    if not len(rows):
        raise UserError(f"none of {len(pairs)} pairs has a prompt of this part of {len(prompts.part)}: make more of them (pairs).")
    return rows


def load_or_make_pairs(method: StoredPairs, preparation: Preparation) -> Pairs:
    """This rank's share of the pairs, from the run's folder if they were made with these very settings."""
    share = method.share(preparation.world_size)
    settings = {
        "teacher": preparation.teacher.identity(),
        "prompts": preparation.prompts.hash(),
        "n": share,
        "steps": method.pair_steps,
        "solver": method.pair_solver,
        "guidance_scale": method.pair_guidance_scale,
        "seed": [preparation.seed, preparation.rank],
    }
    path = preparation.folder / f"pairs-{preparation.rank}.safetensors"
    pairs = Pairs.load(path, settings)
    if pairs is None:
        pairs = make_pairs(
            preparation.teacher,
            preparation.prompts,
            n=share,
            num_inference_steps=method.pair_steps,
            solver=method.pair_solver,
            guidance_scale=method.pair_guidance_scale,
            seed=preparation.seed * 1_000_003 + preparation.rank,
            progress=preparation.progress("making pairs", share),
        )
        pairs.save(path, settings)
    return pairs
