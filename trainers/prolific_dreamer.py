"""Four voxel scenes of one view-conditioned prior, by VSD and by SDS: turntables, and a table of how they differ.

python trainers/prolific_dreamer.py --output runs/prolific-dreamer --max-steps 600

The prior knows five objects from eight azimuths in closed form; its small network, where the fake score starts, is fitted first.
"""

import csv
from pathlib import Path
from typing import Literal

import torch
import tyro

from fastdiff import Trainer
from fastdiff.eval.particles import chroma, log_likelihood, out_of_range, pair_distance
from fastdiff.models.scenes import Camera
from fastdiff.proof import laws
from fastdiff.trainers import ProlificDreamer
from fastdiff.trainers.config import Config


def main(
    output: Path = Path("runs/prolific-dreamer"),
    scores: tuple[Literal["sds", "vsd", "cloud"], ...] = ("sds", "vsd"),
    scene: Literal["voxels", "gaussians"] = "voxels",
    guidance_scale: float = 7.5,
    particles: int = 4,
    max_steps: int = 600,
    batch_size: int = 8,
    seeds: tuple[int, ...] = (0,),
) -> None:
    law, ring = laws.exact("views"), Camera.turntable(laws.VIEWS)
    rows = []
    for score, seed in ((score, seed) for score in scores for seed in seeds):
        method = ProlificDreamer(
            scene=scene,
            score=score,
            guidance_scale=guidance_scale,
            particles=particles,
            lr=1e-2,
            fake_score_lr=2e-3,
            rank=16,
            anneal_after=max_steps * 2 // 3,
            views=laws.VIEWS,
            cameras=laws.VIEWS,
            elevation=(0.0, 0.0),
        )
        folder = output / f"{score}-{seed}"
        config = Config(output_dir=folder, max_steps=max_steps, batch_size=batch_size, ema_decay=0.0, seed=seed)
        trainer = Trainer(method, laws.teacher("views"), config=config)
        scenes = trainer.train().cpu()
        with torch.no_grad():
            seen = torch.stack([scenes(torch.full((len(ring),), k), ring) for k in range(particles)])
        measured = {
            "pair_distance": pair_distance(seen),
            "chroma": chroma(seen),
            "out_of_range": out_of_range(seen),
            "log_likelihood": log_likelihood(law, seen),
        }
        rows.append({"score": score, "seed": seed, **measured, "seconds": trainer.result["seconds_train"]})
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()})
        with (output / "table.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
