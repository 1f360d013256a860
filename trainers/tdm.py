"""Distil a teacher into a deterministic few-step student by trajectory distribution matching.

python trainers/tdm.py --output runs/tdm --max-steps 500 --step-counts 4
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import TDM


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/tdm"),
    max_steps: int = 500,
    step_counts: tuple[int, ...] = (4,),
    guidance_scale: float = 4.5,
    lr: float = 4e-6,
    fake_score_lr: float = 2e-5,
    seed: int = 0,
) -> None:
    method = TDM(step_counts=step_counts, guidance_scale=guidance_scale, lr=lr, fake_score_lr=fake_score_lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(
        output / "sample.png"
    )  # as many calls as it was trained for
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
