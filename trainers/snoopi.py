"""Distil a teacher into one step by SwiftBrush under a random guidance (PG-SB of SNOOPI).

python trainers/snoopi.py --output runs/snoopi --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SNOOPI


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/snoopi"),
    max_steps: int = 1000,
    guidance_range: tuple[float, float] = (0.5, 4.0),
    clip_weight: float = 0.0,
    clip: str = "fashion",
    warm_start_steps: int = 0,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-3,
    seed: int = 0,
) -> None:
    method = SNOOPI(
        guidance_range=guidance_range,
        clip_weight=clip_weight,
        clip=clip,
        warm_start_steps=warm_start_steps,
        lr=lr,
        fake_score_lr=fake_score_lr,
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
