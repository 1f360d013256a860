"""ODE-pair regression: the student repeats the teacher's deterministic few-step result from the same noise, in one call.

    x0(z, y) = solver_8(z, y), guided        L = mean pseudo_huber( f(z, y), x0(z, y) )

Pairs are made from prompts alone and stored. Trained: the student, a full copy of the teacher's network.
Luhman & Luhman, Knowledge Distillation in Iterative Generative Models (arXiv 2101.02388); as the regression term of DMD (CVPR
2024, arXiv 2311.18828). The sheet has it inside DMD; distance, solver and step count are this library's choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._regression import REGRESSION, PairedMethod
from fastdiff.trainers.method import Batch, Calls, Paper, Trial

_TRIAL = {"pairs": 20_000, "pair_steps": 32, "pair_guidance_scale": 1.0, "regression_lr": 2e-3}


@dataclass(kw_only=True)
class ODEPairs(PairedMethod):
    """Regression on the teacher's own deterministic results: stable and quick, the usual warm start."""

    info: ClassVar[Paper] = Paper(
        title="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        venue="arXiv",
        year=2021,
        arxiv="2101.02388",
        sheet="few_step_diffusion.md: DMD and DMD2 (regression term)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL,
            bounds={"flow_map": 0.1, "sliced_w2": 0.15, "mode_mass": 0.2, "mode_spread": 0.4, "stray": 0.08},
            max_steps=1500,
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.1, "w2": 0.5, "axes": 0.4}, max_steps=1500),
        "classes": Trial(
            fields=_TRIAL,
            bounds={"flow_map": 0.1, "sliced_w2": 0.2, "mode_mass": 0.4, "mode_spread": 0.6, "stray": 0.05},
            max_steps=2000,
        ),
        "images": Trial(
            fields={**_TRIAL, "pairs": 4000, "regression_lr": 1e-3},
            bounds={"flow_map": 0.35, "sliced_w2": 0.1, "covariance": 0.2, "mode_mass": 0.3},
            max_steps=600,
            batch_size=64,
        ),
    }

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.regression_lr)}

    def updates(self, step: int) -> tuple[str, ...]:
        return (REGRESSION,)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {"student": Calls(1, 1)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return self.regression(batch, roles)
