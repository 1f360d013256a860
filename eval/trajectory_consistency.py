"""Students of the consistency family on the ring at several numbers of steps and shares of fresh noise: one row each.

Each student is trained once a seed, without guidance, from the same pairs and on the same 40 times, and sampled in every way.
Rows of `teacher` are the exact law under the same sampler. sliced_w2 and stray as in `fastdiff certify`.

python eval/trajectory_consistency.py --seeds 0 1 2
"""

import csv
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from fastdiff import Trainer
from fastdiff.models.denoiser import Denoiser
from fastdiff.proof import laws
from fastdiff.proof.certify import METRICS, Drawn
from fastdiff.trainers import TCD, HyperSD
from fastdiff.trainers._segments import sample_tcd
from fastdiff.trainers.draws import generator_for
from fastdiff.trainers.method import Method

WAYS = [(1, 0.0), (2, 0.0), (2, 0.3), (4, 0.0), (4, 0.3), (4, 1.0), (8, 0.0), (8, 0.3)]
_TSCD: dict[str, Any] = {**HyperSD.trials["ring"].fields}
_ONE: dict[str, Any] = {"one_step_steps": 800, "one_step_warmup": 200, "fake_score_lr": 1e-3}
STUDENTS: dict[str, Method] = {
    "tcd": TCD(**TCD.trials["ring"].fields),
    "tscd": HyperSD(**_TSCD),
    "tscd-first": HyperSD(**_TSCD, stage_teacher="first"),
    "tscd-one-step": HyperSD(**_TSCD, **_ONE),
    "tscd-one-step-0.1": HyperSD(**_TSCD, **_ONE, score_weight=0.1),
}


def rows(student: Denoiser, seed: int, levels_of: Any) -> list[dict[str, float]]:
    """The metrics of 8000 samples made in each of ``WAYS``."""
    law, found = laws.exact("ring"), []
    for steps, eta in WAYS:
        generator = generator_for(seed, "trajectory", steps, str(eta))
        noise = torch.randn(8000, 2, generator=generator)
        reference = law.sample(8000, generator)
        with torch.no_grad():
            x = sample_tcd(student, noise, torch.full((8000,), -1), levels_of(steps), eta, generator)
        drawn = Drawn(x, torch.full((8000,), -1), noise)
        found.append({"steps": steps, "eta": eta, **{m: METRICS[m](law, drawn, reference) for m in ("sliced_w2", "stray")}})
    return found


def train(method: Method, seed: int) -> Denoiser:
    max_steps = sum(stage.steps for stage in method.stages()) if isinstance(method, HyperSD) else 3200
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "batch_size": 512,
            "ema_decay": 0.99,
            "validate_every": 0,
            "save_every": max_steps,
            "log_every": max_steps,
        }
        teacher = laws.teacher("ring", seed=seed)
        run = Trainer(method, teacher, output_dir=Path(folder) / "run", max_steps=max_steps, seed=seed, **options)
        return Denoiser(teacher.family.network(run.train()), teacher.process, teacher.prediction_type)


def main(
    output: Path = Path("docs/results/trajectory_consistency.csv"),
    seeds: tuple[int, ...] = (0,),
    only: tuple[str, ...] = (),
) -> None:
    torch.set_num_threads(1)
    new = not output.exists()
    with output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["student", "seed", "steps", "eta", "sliced_w2", "stray", "seconds_train"])
        if new:
            writer.writeheader()
        for seed in seeds:
            for name, method in {"teacher": None, **STUDENTS}.items():
                if only and name not in only:
                    continue
                clock = time.perf_counter()
                student = laws.teacher("ring", seed=seed).denoiser if method is None else train(method, seed)
                seconds = 0.0 if method is None else time.perf_counter() - clock

                def levels_of(steps: int) -> list[int]:
                    return dataclasses.replace(STUDENTS["tcd"], steps=steps).levels()  # type: ignore[call-arg]

                for row in rows(student, seed, levels_of):
                    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                    writer.writerow({"student": name, "seed": seed, **shown, "seconds_train": round(seconds)})
                    print(name, seed, shown)
                file.flush()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
