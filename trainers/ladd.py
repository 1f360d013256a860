"""Distil a teacher into a few steps by a GAN whose discriminator is the frozen teacher with a head on every block.

python trainers/ladd.py --teacher fashion-flow --output runs/ladd --max-steps 1000
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import LADD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/ladd"),
    max_steps: int = 1000,
    steps: int = 4,
    gan: Literal["softplus", "hinge"] = "softplus",
    r1_weight: float = 0.0,
    lr: float = 1e-5,
    discriminator_lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = LADD(steps=steps, gan=gan, r1_weight=r1_weight, lr=lr, discriminator_lr=discriminator_lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
