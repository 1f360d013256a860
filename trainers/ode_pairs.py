"""Distil a teacher into one step by regression on its own deterministic results.

python trainers/ode_pairs.py --output runs/ode-pairs --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import ODEPairs


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/ode-pairs"),
    max_steps: int = 1000,
    pairs: int = 3000,
    pair_steps: int = 8,
    pair_guidance_scale: float = 3.0,
    seed: int = 0,
) -> None:
    method = ODEPairs(pairs=pairs, pair_steps=pair_steps, pair_guidance_scale=pair_guidance_scale)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
