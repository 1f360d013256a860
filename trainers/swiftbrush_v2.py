"""Distil a teacher into one step by SwiftBrush with a clamped CLIP term; merge two such students with merge_students.py.

python trainers/swiftbrush_v2.py --output runs/swiftbrush-v2 --max-steps 1000
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SwiftBrushV2


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/swiftbrush-v2"),
    max_steps: int = 1000,
    student: Literal["full", "lora"] = "full",
    guidance_scale: float = 4.5,
    clip_weight: float = 0.1,
    clip_decay_steps: int = 1000,
    clip: str = "fashion",
    warm_start_steps: int = 0,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-3,
    seed: int = 0,
) -> None:
    method = SwiftBrushV2(
        student=student,
        guidance_scale=guidance_scale,
        clip_weight=clip_weight,
        clip_decay_steps=clip_decay_steps,
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
