"""Distil a teacher into one step (or a few) by the mean velocity of its trajectories; the network is told how far to jump.

python trainers/meanflow.py --output runs/meanflow --max-steps 1000
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import MeanFlow


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/meanflow"),
    max_steps: int = 1000,
    kind: Literal["distillation", "data"] = "distillation",
    guidance_scale: float = 3.0,
    alpha_steps: int = 0,
    steps: int = 1,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = MeanFlow(kind=kind, guidance_scale=guidance_scale, alpha_steps=alpha_steps, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
