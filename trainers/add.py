"""Distil a teacher into a few steps by a GAN on its own features and by its denoising of the student's noised samples.

python trainers/add.py --teacher fashion-flow --output runs/add --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import ADD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/add"),
    max_steps: int = 1000,
    steps: int = 4,
    distillation_weight: float = 2.5,
    lr: float = 1e-5,
    discriminator_lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = ADD(steps=steps, distillation_weight=distillation_weight, lr=lr, discriminator_lr=discriminator_lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
