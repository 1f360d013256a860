"""How good the teacher's own pairs are, over solver and number of steps: a student of pairs cannot be nearer than they are.

python eval/pair_solvers.py --output docs/results/pair_solvers.json
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fastdiff import Teacher
from fastdiff.data.fashion import random_captions
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.solvers import SOLVERS, trailing_times
from fastdiff.eval.fashion import FashionMetrics
from fastdiff.files import aside
from fastdiff.models.condition import repeat

CASES = tuple((name, k) for name, counts in {"ddim": (8, 16, 25), "dpmpp_2m": (8, 10)}.items() for k in counts)


@torch.no_grad()
def main(output: Path, n: int = 2000, guidance_scale: float = 3.0, seed: int = 0, batch_size: int = 250) -> None:
    teacher, metric, prompts = Teacher.from_pretrained("fashion"), FashionMetrics.load(), random_captions(n, seed)
    noise = torch.randn(n, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    rows = []
    for name, steps in CASES:
        images, began = [], time.perf_counter()
        for start in range(0, n, batch_size):
            cond, z = teacher.encode(prompts[start : start + batch_size]), noise[start : start + batch_size]
            null = repeat(teacher.null, len(z))

            def denoise(x: Tensor, t: Tensor, cond: Any = cond, null: Any = null) -> Prediction:
                return teacher.denoiser.guided(x, t, cond, null, guidance_scale)

            images.append(teacher.decode(SOLVERS[name](denoise, z, trailing_times(1000, steps))))
        seconds, scores = time.perf_counter() - began, metric(torch.cat(images), prompts).values
        rows.append({"solver": name, "steps": steps, **{k: round(scores[k], 4) for k in ("fd", "fd_se", "attributes")}})
        print(f"{name} {steps} steps: FD {scores['fd']:.3f} +- {scores['fd_se']:.3f}, {n / seconds:.0f} images/s", flush=True)
    with aside(output) as part:
        part.write_text(json.dumps({"n": n, "guidance_scale": guidance_scale, "seed": seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
