"""Distil a teacher into one step by the unweighted difference of two denoisers.

python trainers/diff_instruct.py --output runs/diff-instruct --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import DiffInstruct


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/diff-instruct"),
    max_steps: int = 1000,
    guidance_scale: float = 1.0,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-5,
    seed: int = 0,
) -> None:
    method = DiffInstruct(guidance_scale=guidance_scale, lr=lr, fake_score_lr=fake_score_lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
