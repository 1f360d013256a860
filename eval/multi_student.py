"""One, two and four students of the same small size on a law of 8 classes with 3 modes each: what dividing the classes brings.

The generator is an MLP of width 12 that starts from teacher score matching; teacher and fake score are the exact law and an MLP
of width 64. ``per-student`` gives every student all iterations, ``total`` divides them: both are reported, since the first trains
K times as long. The figure is the L1 distance of histograms (0 equal, 2 disjoint), the mean over classes.

python eval/multi_student.py --output docs/results/multi_student.csv --seeds 0 1 2
"""

import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fastdiff import Teacher, Trainer
from fastdiff.data.partition import Partition
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.proof import laws
from fastdiff.trainers import DMD2, TeacherScoreMatching
from fastdiff.trainers.config import Config
from fastdiff.trainers.method import one_step
from fastdiff.trainers.multi_student import MultiStudent, Stage, sample_routed

CLASSES = [str(label) for label in range(8)]
COLUMNS = ["seed", "students", "iterations", "each", "l1", "l1_floor", "seconds"]


def ring() -> GaussianMixture:
    """Classes at radius 2; the modes of a class at radius 0.4 around it, deviation 0.08, turned from class to class."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    turn = angle[:, None] + torch.arange(3) * 2 * torch.pi / 3
    centre = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    means = (centre[:, None] + 0.4 * torch.stack([turn.cos(), turn.sin()], -1)).flatten(0, 1)
    labels = torch.arange(8).repeat_interleave(3)
    return GaussianMixture(means, torch.full((24,), 0.08**2), torch.ones(24), laws.process(), labels=labels)


def l1(samples: Tensor, reference: Tensor, labels: Tensor) -> float:
    """L1 distance of histograms with bins of 0.1, the mean over classes; what lies outside the plane's [-3, 3) counts as lost."""
    distances = []
    for label in labels.unique():
        p, q = (_histogram(x[labels == label]) for x in (samples, reference))
        distances.append((p - q).abs().sum() + abs(p.sum() - q.sum()))
    return torch.stack(distances).mean().item()


def _histogram(x: Tensor) -> Tensor:
    cell = ((x + 3) / 0.1).floor().long()
    inside = ((cell >= 0) & (cell < 60)).all(1)
    return torch.bincount(cell[inside] @ torch.tensor([60, 1]), minlength=3600).double() / len(x)


def config(folder: Path, steps: int, seed: int) -> Config:
    options = {"ema_decay": 0.99, "validate_every": 0, "save_every": steps, "log_every": max(steps // 10, 1)}
    return Config.of(output_dir=folder, max_steps=steps, batch_size=256, seed=seed, **options)


def main(
    output: Path = Path("docs/results/multi_student.csv"),
    seeds: tuple[int, ...] = (0, 1, 2),
    students: tuple[int, ...] = (1, 2, 4),
    steps: int = 4000,
    width: int = 12,
) -> None:
    law = ring()
    new = not output.exists()
    with output.open("a", newline="") as file, tempfile.TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for seed in seeds:
            torch.manual_seed(seed)
            module = TimeMLP(2, hidden=64, classes=8)
            teacher = Teacher.from_module(
                module, law.process, laws.LAWS["ring"].prediction_type, shape=(2,), prompts=CLASSES, name="ring-8x3", law=law
            )
            pairs: dict[str, Any] = {"pairs": 8000, "pair_steps": 16, "pair_guidance_scale": 1.0}
            for name, share in (("teacher", 1.0), ("small", width / 64)):  # the fake score's start, and the students'
                match = TeacherScoreMatching(width=share, lr=3e-3, **pairs)
                network = Trainer(match, teacher, config=config(Path(scratch, name, str(seed)), 2000, seed)).train()
                if name == "teacher":
                    module.load_state_dict(network.state_dict())
            method = DMD2(guidance_scale=1.0, lr=1e-3, fake_score_lr=2e-3, ratio=(1, 2))
            generator = torch.Generator().manual_seed(1000 + seed)
            labels = torch.arange(8).repeat_interleave(20_000)
            noise, fresh, reference = (
                torch.randn(len(labels), 2, generator=generator),
                *(law.sample(len(labels), generator, labels) for _ in "ab"),
            )
            floor = l1(fresh, reference, labels)
            for k in students:
                for which, each in {"per-student": steps, **({"total": steps // k} if k > 1 else {})}.items():
                    partition, clock = Partition.by_class(CLASSES, k), time.perf_counter()
                    stage = Stage(method=method, config=config(Path("unused"), each, seed))
                    folder = Path(scratch, f"{seed}-{k}-{which}")
                    run = MultiStudent(teacher=teacher, partition=partition, stages={"dm": stage}, folder=folder, network=network)
                    trained = [Denoiser(n, law.process, teacher.prediction_type) for n in run.train()]
                    seconds = time.perf_counter() - clock
                    route = partition.route(CLASSES)[labels]
                    value = l1(sample_routed(trained, route, noise, labels, one_step), reference, labels)
                    row = [seed, k, which, each, round(value, 4), round(floor, 4), round(seconds, 1)]
                    writer.writerow(dict(zip(COLUMNS, row, strict=True)))
                    file.flush()
                    print(*row, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
