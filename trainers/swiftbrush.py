"""Distil a teacher into one step by variational score distillation, from prompts alone.

python trainers/swiftbrush.py --output runs/swiftbrush --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SwiftBrush


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/swiftbrush"),
    max_steps: int = 1000,
    warm_start_steps: int = 0,
    guidance_scale: float = 4.5,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-3,
    seed: int = 0,
) -> None:
    method = SwiftBrush(guidance_scale=guidance_scale, lr=lr, fake_score_lr=fake_score_lr, warm_start_steps=warm_start_steps)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
