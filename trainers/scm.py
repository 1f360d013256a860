"""Distil a teacher into one or a few steps by continuous-time consistency (sCD), or learn from its results alone (sCT).

python trainers/scm.py --output runs/scm --max-steps 1000
"""

from pathlib import Path
from typing import Literal

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SCM


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/scm"),
    max_steps: int = 1000,
    kind: Literal["scd", "sct"] = "scd",
    guidance_scale: float = 3.0,
    tangent_warmup: int | None = None,
    steps: int = 1,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = SCM(kind=kind, guidance_scale=guidance_scale, tangent_warmup=tangent_warmup, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
