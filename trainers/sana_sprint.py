"""Distil a SANA teacher into one network for one, two and four steps, told its guidance scale: a stock SanaSprintPipeline.

python trainers/sana_sprint.py --output runs/sana-sprint --max-steps 2000 --adaptation-steps 200 --tangent-warmup 500
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.pipelines.few_step import own_call
from fastdiff.trainers import SanaSprint


def main(
    teacher: str = "fashion-flow",
    prompts: Path | None = None,
    output: Path = Path("runs/sana-sprint"),
    max_steps: int = 2000,
    steps: int = 2,
    guidance_scale: float = 4.5,
    guidance_choices: tuple[float, ...] = (4.0, 4.5, 5.0),
    adversarial_weight: float = 0.5,
    adaptation_steps: int = 0,
    tangent_warmup: int = 4000,
    lr: float = 1e-4,
    seed: int = 0,
) -> None:
    method = SanaSprint(
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_choices=guidance_choices,
        pair_guidance_scale=guidance_scale,
        adversarial_weight=adversarial_weight,
        adaptation_steps=adaptation_steps,
        tangent_warmup=tangent_warmup,
        lr=lr,
    )
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    pipeline = trainer.train()
    pipeline(trainer.prompts.prompts[0], **own_call(pipeline)).images[0].save(output / "sample.png")
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
