"""Distil a teacher into a few-step consistency model: by its own steps (cd) or from samples alone (ct, ict, ect).

python trainers/consistency.py --output runs/consistency --kind cd --max-steps 1000
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import Consistency


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/consistency"),
    max_steps: int = 1000,
    kind: Literal["cd", "ct", "ict", "ect"] = "cd",
    steps: int = 4,
    guidance_scale: float = 3.0,
    truncation: float | None = None,
    truncation_start: int = 0,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = Consistency(
        kind=kind,
        steps=steps,
        guidance_scale=guidance_scale,
        pair_guidance_scale=guidance_scale,
        truncation=truncation,
        truncation_start=truncation_start,
        lr=lr,
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
