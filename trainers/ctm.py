"""Distil a teacher into a student that jumps between any two times of its trajectories (CTM, without its GAN term).

python trainers/ctm.py --output runs/ctm --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import CTM


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/ctm"),
    max_steps: int = 1000,
    guidance_scale: float = 3.0,
    solver_steps: int = 2,
    decay: float = 0.999,
    steps: int = 1,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = CTM(guidance_scale=guidance_scale, solver_steps=solver_steps, decay=decay, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
