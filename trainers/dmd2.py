"""Distil a teacher into one step by distribution matching; --gan-weight 1e-3 adds the adversarial term.

python trainers/dmd2.py --output runs/dmd2 --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import DMD2


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/dmd2"),
    max_steps: int = 1000,
    warm_start_steps: int = 0,
    guidance_scale: float = 1.75,
    ratio: tuple[int, int] = (1, 5),
    lr: float = 1e-5,
    gan_weight: float = 0.0,
    seed: int = 0,
) -> None:
    method = DMD2(
        guidance_scale=guidance_scale,
        ratio=ratio,
        lr=lr,
        fake_score_lr=lr,
        gan_weight=gan_weight,
        warm_start_steps=warm_start_steps,
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
