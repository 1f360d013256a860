"""Distil a teacher into one step by distribution matching under another f-divergence, such as forward_kl.

python trainers/f_distill.py --output runs/f-distill --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import FDistill
from fastdiff.trainers.f_distill import Divergence


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/f-distill"),
    max_steps: int = 1000,
    divergence: Divergence = "jensen_shannon",
    warm_start_steps: int = 0,
    guidance_scale: float = 1.75,
    gan_weight: float = 1e-3,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-5,
    seed: int = 0,
) -> None:
    method = FDistill(
        divergence=divergence,
        warm_start_steps=warm_start_steps,
        guidance_scale=guidance_scale,
        gan_weight=gan_weight,
        lr=lr,
        fake_score_lr=fake_score_lr,
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
