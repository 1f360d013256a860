"""How straight sampling paths are before and after reflow on a law known in closed form, and what few steps then make.

python eval/straightness.py --trials ring ring-flow --seeds 0 1 2
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fastdiff import Trainer
from fastdiff.diffusion import Prediction, trailing_times
from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.solvers import ddim_sample
from fastdiff.diffusion.straight import straightness
from fastdiff.eval.distributions import sliced_w2
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.teacher import Teacher
from fastdiff.proof.laws import teacher
from fastdiff.trainers import Reflow


def row(name: str, denoise: Callable[[Tensor, Tensor], Prediction], oracle: Teacher, seed: int, n: int) -> str:
    """Straightness over 32 steps, and the sliced W2 of 1, 2 and 4 DDIM steps."""
    law, process = oracle.law, oracle.process
    generator = torch.Generator().manual_seed(seed + 100)
    x, reference = process.initial_scale * torch.randn(n, *oracle.latent_shape, generator=generator), law.sample(n, generator)  # type: ignore[union-attr]

    def times(steps: int) -> Tensor:
        return process.at_level(torch.tensor(trailing_times(LEVELS, steps)))

    with torch.no_grad():
        found = [straightness(denoise, x, times(32)).mean().item()]
        found += [sliced_w2(ddim_sample(denoise, x, times(k)), reference) for k in (1, 2, 4)]
    return f"| {name} | {seed} | {' | '.join(f'{value:.4f}' for value in found)} |"


def main(trials: tuple[str, ...] = ("ring",), seeds: tuple[int, ...] = (0, 1, 2), n: int = 4000) -> None:
    print("| paths of | seed | straightness | sliced W2, 1 step | 2 steps | 4 steps |\n|---|---|---|---|---|---|")
    for trial, seed in ((trial, seed) for trial in trials for seed in seeds):
        given, oracle = Reflow.trials[trial], teacher(Reflow.trials[trial].law or trial, seed=seed)
        options: dict[str, Any] = {"max_steps": given.max_steps, "batch_size": given.batch_size, "ema_decay": given.ema_decay}
        with tempfile.TemporaryDirectory() as folder:
            run = Trainer(Reflow(**given.fields), oracle, output_dir=Path(folder) / "run", seed=seed, validate_every=0, **options)
            network = run.train()
        student = Denoiser(oracle.family.network(network), oracle.process, oracle.prediction_type)
        for name, denoiser in ((f"the law ({trial})", oracle.denoiser), (f"reflow ({trial})", student)):
            print(row(name, lambda x, t, d=denoiser: d(x, t, None), oracle, seed, n), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
