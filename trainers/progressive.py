"""Distil a teacher into a few deterministic steps by halving their number, round after round.

python trainers/progressive.py --output runs/progressive --round-steps 300
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import ProgressiveDistillation
from fastdiff.trainers.config import Config


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/progressive"),
    start_steps: int = 16,
    steps: int = 4,
    round_steps: int = 300,
    guidance_scale: float = 3.0,
    lr: float = 3e-4,
    seed: int = 0,
) -> None:
    method = ProgressiveDistillation(
        start_steps=start_steps, steps=steps, round_steps=round_steps, guidance_scale=guidance_scale, lr=lr
    )
    rounds = (start_steps // steps).bit_length() - 1
    config = Config(max_steps=rounds * round_steps, output_dir=output, lr_schedule="constant", ema_decay=0.98, seed=seed)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, config=config)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
