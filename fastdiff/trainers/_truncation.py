"""TCM's truncation of consistency training: a second stage at the noisy times alone, held at their end by the first stage.

    t'                                  the time of noise-to-signal ratio ``truncation``
    t > t', r >= t'                     the target is the method's own
    r < t'                              the target is the first stage's student, averaged, copied once and frozen
    t = t' exactly                      ``boundary_share`` of the samples, so that the student meets the frozen one there
    L = L_consistency + w_b L_boundary  each the mean over its own samples, w_b = ``boundary_weight``

The network no longer spends itself on times below t', which few-step sampling does not ask at. A sample draws its kind by itself,
so that no cut of the batch into micro-batches or ranks changes a loss: both means are means in expectation. Both stages are one
run, from ``truncation_start`` on the second; or the run is the second alone, from a student of an earlier one.
Truncated Consistency Models (ICLR 2025, arXiv 2410.14895); shares and weights as the sheet read them in FastGen's code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._consistency import TARGET, ConsistencyMethod, Truncated
from fastdiff.trainers.method import Batch, Calls

BOUNDARY = "boundary"
TRUNCATED = "truncated"


@dataclass(kw_only=True)
class TruncatedConsistency(ConsistencyMethod):
    """A consistency method that may be truncated from some iteration on."""

    truncation: float | None = None
    """TCM: the noise-to-signal ratio of t', in the papers' EDM its sigma, which is 1 there. None: all times are trained."""
    truncation_start: int = 0
    """TCM: the first iteration of the second stage. 0: the student begins from a finished first stage (``Start``); if it began
    from the teacher, it would be held to the teacher's own x0 below t', which is no end of a trajectory."""
    boundary_share: float = 0.25
    """TCM: share of the samples whose time is t' exactly."""
    boundary_weight: float = 0.1
    """TCM: weight of their mean loss beside that of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.truncation is not None and not self.truncation > 0:
            raise UserError(f"truncation is {self.truncation}: expected a noise-to-signal ratio above 0, or none.")
        if not 0 <= self.boundary_share < 1:
            raise UserError(
                f"boundary_share is {self.boundary_share}: expected it in [0, 1), or no time above t' would be trained."
            )
        for name in ("truncation_start", "boundary_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative.")

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        low, high = teacher.process.nsr(teacher.process.at_level(torch.tensor([0, LEVELS - 1]))).tolist()
        if self.truncation is not None and not low <= self.truncation <= high:
            raise UserError(
                f"truncation is {self.truncation}, and {teacher.name} has noise-to-signal ratios of {low:.3g} to {high:.3g}: t' "
                "would silently be the nearest of these. Give one between them."
            )

    def check_length(self, max_steps: int) -> None:
        if self.truncation is not None and max_steps <= self.truncation_start:
            raise UserError(
                f"truncation_start is {self.truncation_start} and max_steps {max_steps}: the run would end before anything is "
                "truncated. Give a later end, or an earlier start."
            )

    def roles(self) -> dict[str, Role]:
        return {} if self.truncation is None else {BOUNDARY: Role(train="average")}

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",) if self.truncation is None or step < self.truncation_start else (TRUNCATED,)

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student",)

    def restarts(self, step: int) -> tuple[str, ...]:
        return ("student",) if self.truncation is not None and step == self.truncation_start > 0 else ()

    def begin(self, step: int, roles: Roles) -> None:
        """The second stage starts from one network: student, its average, and the frozen one."""
        if self.truncation is not None and step == self.truncation_start:
            for name in roles.specs.keys() & {TARGET, BOUNDARY}:
                roles.follow(name, "student", 0.0)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {BOUNDARY: Calls(1, 0)} if TRUNCATED in updates else {}

    def truncated(self, update: str, batch: Batch) -> Truncated | None:
        """t' and who is there, in the second stage."""
        if self.truncation is None or update != TRUNCATED:
            return None
        return Truncated(self.truncation, batch.draws.uniform("edge") < self.boundary_share)

    def weights(self, truncated: Truncated | None) -> Tensor | None:
        """What makes one mean over all samples the weighted sum of both means, [B]."""
        if truncated is None:
            return None
        share = self.boundary_share
        return torch.where(truncated.at_edge, self.boundary_weight / share if share else 0.0, 1 / (1 - share))
