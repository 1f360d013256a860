"""The mass of a mode that has 0.1 of a law, under f-distill's divergences: does a weight that leans on what is lacking keep it?

python eval/unequal_mixture.py --divergences reverse_kl forward_kl jensen_shannon --seeds 0 --max-steps 1500
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.models.mlp import TimeMLP
from fastdiff.proof.certify import certify_instance
from fastdiff.proof.laws import LAWS, KnownLaw
from fastdiff.trainers import FDistill
from fastdiff.trainers.f_distill import Divergence
from fastdiff.trainers.method import Trial

SETTINGS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "lr": 1e-3,
    "fake_score_lr": 2e-3,
    "ratio": (1, 2),
    "pairs": 10_000,
    "pair_steps": 32,
}


def unequal(process: NoiseProcess) -> GaussianMixture:
    """Two modes of deviation 0.15 at (-2, 0) and (2, 0), of masses 0.9 and 0.1."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((2,), 0.15**2, dtype=torch.float64), torch.tensor([0.9, 0.1]), process)


def main(
    divergences: Sequence[Divergence] = ("reverse_kl", "forward_kl", "jensen_shannon"),
    seeds: Sequence[int] = (0,),
    max_steps: int = 1500,
    discriminator_weight: float = 1e-2,
    output: Path | None = None,
) -> None:
    LAWS["unequal"] = KnownLaw(unequal, lambda: TimeMLP(2), 8000, 1500, 512, {"bottleneck": ("hidden", 128)})
    trial = Trial(fields={}, bounds={"mode_mass": 1.0, "stray": 1.0, "sliced_w2": 1.0}, max_steps=max_steps)
    rows = []
    for divergence in divergences:
        for seed in seeds:
            method = FDistill(divergence=divergence, discriminator_weight=discriminator_weight, **SETTINGS)
            mass, stray, distance = certify_instance(method, "unequal", trial, seed=seed)
            row = {"divergence": divergence, "seed": seed, "masses": [round(m, 4) for m in mass.details["masses"]]}
            rows.append(
                row
                | {
                    "stray": round(stray.value, 4),
                    "sliced_w2": round(distance.value, 4),
                    "steps": max_steps,
                    "discriminator_weight": discriminator_weight,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
