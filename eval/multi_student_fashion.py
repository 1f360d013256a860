"""Two half-width students against one full one on the bundled world, at equal iterations a student: quality and latency.

Also one half-width student for everything, which tells what the division itself brings. Half-width students start from teacher
score matching; all are then warmed up on the same ODE pairs and trained by DMD2. The two have five garments each.

python eval/multi_student_fashion.py --output docs/results/multi_student_fashion.csv
"""

import csv
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from fastdiff import Teacher
from fastdiff.data.fashion import captions, parse
from fastdiff.data.partition import Partition
from fastdiff.eval.fashion import fashion_rows
from fastdiff.trainers import DMD2, TeacherScoreMatching
from fastdiff.trainers.config import Config
from fastdiff.trainers.multi_student import MultiStudent, Stage

COLUMNS = ["candidate", "seed", "students", "student_m", "touched_m", "iterations", "seconds_train"]
MEASURED = ["fd", "fd_se", "attributes", "attributes_se", "nfe", "pipeline_ms", "network_ms"]


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int = 100) -> dict[str, float]:
    """Median time of each call, made in turns: what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            clock = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - clock))
    return {name: statistics.median(found[3:]) for name, found in times.items()}


@torch.no_grad()
def latencies(pipelines: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of one image, for each pipeline: the whole call, and the student alone."""
    prompt, states, guidance = captions()[0], torch.zeros(1, 16, 64), torch.zeros(1, 4)
    whole: dict[str, Callable[[], object]] = {k: partial(p, prompt, output_type="pt") for k, p in pipelines.items()}
    latents, t = torch.zeros(1, 4, 8, 8), torch.tensor(999)
    alone: dict[str, Callable[[], object]] = {
        k: partial(p.unet.student(0), latents, t, states, timestep_cond=guidance) for k, p in pipelines.items()
    }
    found = (milliseconds(whole), milliseconds(alone))
    return {name: {"pipeline_ms": found[0][name], "network_ms": found[1][name]} for name in pipelines}


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
    method = DMD2(guidance_scale=3.0, lr=1e-4, fake_score_lr=5e-4, ratio=(1, 2), warm_start_steps=warm_start_steps, pairs=pairs)
    match = Stage(method=TeacherScoreMatching(pairs=pairs), config=Config.of(max_steps=tsm_steps, **rest), shared=True)
    train = Stage(method=method, config=Config.of(max_steps=steps, **rest))
    rows: dict[str, dict[str, Any]] = {}
    pipelines: dict[str, Any] = {}
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
        pipeline = pipelines[name] = run.train()
        first = run.run_folder("dm", 0) / "pairs-0.safetensors"
        row = rows[name] = fashion_rows({name: pipeline}, None, n=n)[0].row()
        pipeline(captions()[0], output_type="pt")
        touched = pipeline.touched()
        row |= {"candidate": name, "seed": seed, "students": students, "iterations": steps}
        row |= {"student_m": touched["student"] / 1e6, "touched_m": (touched["student"] + touched["shared"]) / 1e6}
        row |= {"seconds_train": sum(result["seconds_train"] for result in run.result.values() if isinstance(result, dict))}
        print({key: row.get(key) for key in COLUMNS + MEASURED}, flush=True)
    new, found = not output.exists(), latencies(pipelines)
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + MEASURED, extrasaction="ignore")
        if new:
            writer.writeheader()
        for name, row in rows.items():
            row |= found[name]
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(name, found[name])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
