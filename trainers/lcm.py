"""Distil a teacher into a few-step student that is told its guidance scale, by latent consistency.

python trainers/lcm.py --output runs/lcm --max-steps 1000 --guidance-range 2 4
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import LCM


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/lcm"),
    max_steps: int = 1000,
    guidance_range: tuple[float, float] = (6.0, 16.0),
    steps: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = LCM(guidance_range=guidance_range, steps=steps, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    call = own_call(pipeline)  # the guidance scale, and the steps where they are not 4: also in the folder's card
    pipeline(trainer.prompts.prompts[0], **call).images[0].save(output / "sample.png")
    print(call, trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
