"""Distil a teacher into one step by score identities, with gradients through both networks.

python trainers/sid.py --output runs/sid --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SiD


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/sid"),
    max_steps: int = 1000,
    guidance_scale: float = 1.5,
    alpha: float = 1.0,
    lr: float = 1e-5,
    fake_score_lr: float = 1e-5,
    seed: int = 0,
) -> None:
    method = SiD(guidance_scale=guidance_scale, alpha=alpha, lr=lr, fake_score_lr=fake_score_lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
