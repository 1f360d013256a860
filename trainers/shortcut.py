"""Distil a teacher into 1, 2, 4 .. steps alike: each long jump of the student repeats two of its own half as long.

python trainers/shortcut.py --output runs/shortcut --max-steps 1000 --steps 2
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import Shortcut


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/shortcut"),
    max_steps: int = 1000,
    kind: Literal["distillation", "data"] = "distillation",
    guidance_scale: float = 3.0,
    bootstrap_share: float = 0.125,
    decay: float = 0.999,
    steps: int = 1,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = Shortcut(kind=kind, guidance_scale=guidance_scale, bootstrap_share=bootstrap_share, decay=decay, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
