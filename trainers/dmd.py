"""Distil a teacher into one step by distribution matching, held to its own results by regression.

python trainers/dmd.py --output runs/dmd --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import DMD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/dmd"),
    max_steps: int = 1000,
    guidance_scale: float = 3.0,
    regression_weight: float = 0.25,
    warm_start_steps: int = 0,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-5,
    seed: int = 0,
) -> None:
    method = DMD(
        guidance_scale=guidance_scale,
        regression_weight=regression_weight,
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
