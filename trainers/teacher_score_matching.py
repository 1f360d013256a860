"""Make a smaller network repeat a teacher's scores: where a smaller one-step student starts.

python trainers/teacher_score_matching.py --output runs/tsm --width 0.5 --max-steps 1000
"""

from pathlib import Path

import tyro

from fastdiff import Teacher, Trainer
from fastdiff.trainers import TeacherScoreMatching


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/tsm"),
    max_steps: int = 1000,
    width: float = 0.5,
    layers: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    method = TeacherScoreMatching(width=width, layers=layers, lr=lr)
    trainer = Trainer(method, Teacher.from_pretrained(teacher), prompts=prompts, output_dir=output, max_steps=max_steps, seed=seed)
    trainer.train()
    print(trainer.result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
