"""Distil a teacher into several one-step students, each for a part of the prompts, and one pipeline that routes to them.

python trainers/multi_student.py --output runs/multi --students 2 --width 0.5 --max-steps 600
"""

from pathlib import Path

import tyro

from fastdiff import Teacher
from fastdiff.data.partition import Partition
from fastdiff.data.prompts import read_prompts
from fastdiff.trainers import DMD2, TeacherScoreMatching
from fastdiff.trainers.config import Config
from fastdiff.trainers.multi_student import MultiStudent, Stage


def main(
    teacher: str = "fashion",
    prompts: Path | None = None,
    output: Path = Path("runs/multi"),
    students: int = 4,
    student: int | None = None,
    width: float = 1.0,
    max_steps: int = 600,
    tsm_steps: int = 300,
    adversarial_steps: int = 0,
    warm_start_steps: int = 400,
    guidance_scale: float = 3.0,
    lr: float = 1e-4,
    seed: int = 0,
    resume: bool = False,
) -> None:
    method = {"guidance_scale": guidance_scale, "lr": lr, "fake_score_lr": 5 * lr, "ratio": (1, 2)}
    dm, adm = DMD2(warm_start_steps=warm_start_steps, **method), DMD2(gan_weight=1e-3, **method)  # type: ignore[arg-type]
    stages = {
        "tsm": Stage(method=TeacherScoreMatching(width=width), config=Config(max_steps=tsm_steps, seed=seed), shared=True),
        "dm": Stage(method=dm, config=Config(max_steps=max_steps, seed=seed)),
        "adm": Stage(method=adm, config=Config(max_steps=max(1, adversarial_steps), seed=seed)),
    }
    left_out = {"tsm"} if width == 1 else set()
    left_out |= {"adm"} if adversarial_steps == 0 else set()
    frozen = Teacher.from_pretrained(teacher)
    run = MultiStudent(
        teacher=frozen,
        partition=Partition.by_clusters(read_prompts(prompts, frozen), students, frozen, seed=seed),
        stages={name: stage for name, stage in stages.items() if name not in left_out},
        folder=output,
        resume=resume,
    )
    pipeline = run.train(None if student is None else [student])
    if pipeline is not None:
        pipeline(run.partition.prompts[0]).images[0].save(output / "sample.png")
        print(run.result, pipeline.touched())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
