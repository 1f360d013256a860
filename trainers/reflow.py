"""Straighten a teacher's sampling paths on its stored pairs, and distil the result into one step if asked to (InstaFlow).

python trainers/reflow.py --output runs/reflow --max-steps 1000
python trainers/reflow.py --output runs/instaflow --max-steps 1000 --distill --round-steps 500
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import Reflow


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/reflow"),
    max_steps: int = 1000,
    steps: int = 1,
    rounds: int = 1,
    distill: bool = False,
    round_steps: int = 500,
    pair_guidance_scale: float = 3.0,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = Reflow(
        steps=steps, rounds=rounds, distill=distill, round_steps=round_steps, pair_guidance_scale=pair_guidance_scale, lr=lr
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
