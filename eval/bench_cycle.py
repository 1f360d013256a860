"""What the rollout pool saves: DMD2's cycle of 5 fake-score updates and 1 of the student at 4 steps, against a rollout a loss.

Both are the same trainer, teacher and batch, alternating in groups of four cycles, so that the separate rollouts, whose length goes
through 0..3 calls, have their mean of 1.5. Prints the median of the paired ratios of wall time with a bootstrap interval, beside
the forwards that were counted (a backward counts two).

python eval/bench_cycle.py --pairs 10 --batch-size 32 --json-path docs/results/bench_cycle.json
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fastdiff import Teacher, Trainer
from fastdiff.trainers import DMD2
from fastdiff.trainers.method import Batch
from fastdiff.trainers.trajectory import trajectory

GROUP, USES, STEPS = 4, 5, 4


@dataclass(kw_only=True)
class SeparateRollouts(DMD2):
    """DMD2 that runs the student from noise for every loss, without gradient up to the step it trains."""

    def updates(self, step: int) -> tuple[str, ...]:
        return ("fake_score", "student") if step % USES == USES - 1 else ("fake_score",)

    def _input(self, name: str, batch: Batch, roles: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._asked = getattr(self, "_asked", -1) + 1
        rung, levels = self._asked % STEPS, self.levels()
        noise = [batch.noise(f"{name}_{i}") for i in range(rung + 1)]
        t = batch.teacher.process.at_level(torch.tensor(levels[rung])).expand(len(batch))
        if rung == 0:
            return noise[0], t
        with torch.no_grad():
            made = trajectory(roles.denoiser("student"), noise[0], batch.cond, levels[:rung], self.sampler, lambda i: noise[i])
            return batch.teacher.process.add_noise(made[-1].x0, noise[rung], t), t

    def _generate(self, batch: Batch, roles: Any) -> tuple[torch.Tensor, Any]:
        x_t, t = self._input("student_z", batch, roles)
        return roles.denoiser("student")(x_t, t, batch.cond).x0, batch.cond

    @torch.no_grad()
    def _generated(self, batch: Batch, roles: Any) -> tuple[torch.Tensor, Any]:
        x_t, t = self._input("fake_z", batch, roles)
        return roles.denoiser("student")(x_t, t, batch.cond).x0, batch.cond


def started(method: DMD2, folder: str, batch_size: int) -> Trainer:
    trainer = Trainer(
        method, Teacher.from_pretrained("fashion"), output_dir=folder, max_steps=10**6, batch_size=batch_size,
        save_every=10**6, validate_every=0, log_every=10**6, ema_decay=0.0,
    )  # fmt: skip
    trainer.start()
    return trainer


def group(trainer: Trainer) -> float:
    """Seconds of four cycles."""
    clock = time.perf_counter()
    for _ in range(GROUP * USES):
        trainer.advance()
    return time.perf_counter() - clock


def forwards(trainer: Trainer) -> float:
    """Of a cycle, in calls of the whole batch; a backward counts two."""
    roles = trainer._roles
    samples = sum(roles.ledger.values()) + 2 * sum(roles.backwards.values())
    return samples * USES / (trainer._step * trainer.config.batch_size)


def main(pairs: int = 10, batch_size: int = 32, guidance_scale: float = 3.0, json_path: Path | None = None) -> None:
    options: dict[str, Any] = {"steps": STEPS, "ratio": (1, USES), "guidance_scale": guidance_scale}
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        pooled, separate = started(DMD2(**options), a, batch_size), started(SeparateRollouts(**options), b, batch_size)
        for trainer in (pooled, separate):
            group(trainer)
        times: dict[str, list[float]] = {"pool": [], "separate": []}
        for i in range(pairs):
            for name, trainer in (("pool", pooled), ("separate", separate))[:: 1 if i % 2 else -1]:
                times[name].append(group(trainer))
        counted = {"pool": forwards(pooled), "separate": forwards(separate)}
        for trainer in (pooled, separate):
            trainer.close()
    ratios = torch.tensor([p / s for p, s in zip(times["pool"], times["separate"], strict=True)])
    draws = ratios[torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))]
    low, high = draws.median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    row = {
        "median_ratio": round(ratios.median().item(), 4), "ci95": [round(low, 4), round(high, 4)], "pairs": pairs,
        "forwards": counted, "ms_a_cycle": {k: round(1000 * statistics.median(v) / GROUP, 1) for k, v in times.items()},
        "batch_size": batch_size, "guidance_scale": guidance_scale, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(row))
    if json_path:
        json_path.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
