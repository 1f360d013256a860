"""Two half-width students against one full one on the bundled world, at equal iterations a student: quality and latency.

Also one half-width student for everything, which tells what the division itself brings. Half-width students start from teacher
score matching; all are then warmed up on the same ODE pairs and trained by DMD2. The two have five garments each.

python eval/multi_student_fashion.py --output docs/results/multi_student_fashion.csv
"""

import csv
import shutil
from pathlib import Path

import tyro

from fastdiff import Teacher
from fastdiff.data.fashion import captions, parse
from fastdiff.data.partition import Partition
from fastdiff.eval.fashion import fashion_rows
from fastdiff.trainers import DMD2, TeacherScoreMatching
from fastdiff.trainers.config import Config
from fastdiff.trainers.multi_student import MultiStudent, Stage

COLUMNS = ["candidate", "seed", "students", "student_m", "touched_m", "iterations", "seconds_train"]
MEASURED = ["fd", "fd_se", "attributes", "attributes_se", "nfe", "latency_p50_ms", "latency_p95_ms"]


def main(
    output: Path = Path("docs/results/multi_student_fashion.csv"),
    runs: Path = Path("runs/multi-student"),
    steps: int = 600,
    warm_start_steps: int = 400,
    tsm_steps: int = 300,
    pairs: int = 2000,
    seed: int = 0,
    n: int = 2000,
) -> None:
    teacher = Teacher.from_pretrained("fashion")
    rest = {"batch_size": 64, "validate_every": 0, "save_every": 10**6, "seed": seed}
    method = DMD2(
        guidance_scale=3.0, lr=1e-4, fake_score_lr=5e-4, ratio=(1, 2), warm_start_steps=warm_start_steps, pairs=pairs
    )
    match = Stage(method=TeacherScoreMatching(pairs=pairs), config=Config.of(max_steps=tsm_steps, **rest), shared=True)
    train = Stage(method=method, config=Config.of(max_steps=steps, **rest))
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + MEASURED, extrasaction="ignore")
        if new:
            writer.writeheader()
        first: Path | None = None
        for name, students, half in (("full-1", 1, False), ("half-2", 2, True), ("half-1", 1, True)):
            folder = runs / f"{name}-{seed}"
            if first is not None:  # the pairs are the same
                made = folder / "runs" / "all" / "tsm"
                made.mkdir(parents=True)
                shutil.copyfile(first, made / first.name)
            partition = Partition.by_class(captions(), students, label=lambda caption: parse(caption).garment)
            stages = {"tsm": match, "dm": train} if half else {"dm": train}
            run = MultiStudent(teacher=teacher, partition=partition, stages=stages, folder=folder)
            pipeline = run.train()
            first = run.run_folder("dm", 0) / "pairs-0.safetensors"
            row = fashion_rows({name: pipeline}, None, n=n)[0].row()
            pipeline(captions()[0], output_type="pt")
            touched = pipeline.touched()
            row |= {"candidate": name, "seed": seed, "students": students, "iterations": steps}
            row |= {"student_m": touched["student"] / 1e6, "touched_m": (touched["student"] + touched["shared"]) / 1e6}
            row |= {"seconds_train": sum(result["seconds_train"] for result in run.result.values() if isinstance(result, dict))}
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            file.flush()
            print({key: row.get(key) for key in COLUMNS + MEASURED}, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
