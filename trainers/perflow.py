"""Straighten a teacher's sampling paths within each of a few windows; the student makes one step in each.

python trainers/perflow.py --output runs/perflow --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import PeRFlow


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/perflow"),
    max_steps: int = 1000,
    windows: int = 4,
    window_steps: int = 4,
    guidance_scale: float = 3.0,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = PeRFlow(windows=windows, window_steps=window_steps, guidance_scale=guidance_scale, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
