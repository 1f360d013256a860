"""What the engine costs: its training iteration against the bare forwards, backwards and optimiser steps it consists of.

Both run on the same teacher, batch and draws, alternating; the bare loop is SwiftBrush's iteration written out by hand with
neither logs, checkpoints, health checks nor roles. Prints the median of the paired ratios with a bootstrap interval.

python eval/bench_step.py --pairs 40 --batch-size 32
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro

from fastdiff import Teacher, Trainer
from fastdiff.data.prompts import PromptTable, read_prompts
from fastdiff.losses import denoising, pseudo_target, reduce, variational_score_gradient
from fastdiff.models.condition import repeat
from fastdiff.models.roles import Roles
from fastdiff.trainers import SwiftBrush


class Bare:
    """SwiftBrush's iteration by hand."""

    def __init__(self, teacher: Teacher, method: SwiftBrush, size: int) -> None:
        self.teacher, self.method, self.size = teacher, method, size
        self.roles, self.prompts = Roles(teacher, method.roles()), PromptTable(read_prompts(None, teacher), teacher)
        self.optimizers = {
            name: torch.optim.AdamW(self.roles.parameters(name), lr=role.lr, betas=role.betas, weight_decay=0.0)
            for name, role in method.roles().items()
        }

    def step(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.roles.parameters(name), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def iteration(self) -> None:
        size, scale, process = self.size, self.method.guidance_scale, self.teacher.process
        student, real, fake = (self.roles.denoiser(name) for name in ("student", "teacher", "fake_score"))
        cond, null = self.prompts.conditions(torch.randint(len(self.prompts), (size,))), repeat(self.teacher.null, size)
        self.roles.train_only("student")
        z = torch.randn(size, *self.teacher.latent_shape)
        x = student(z, torch.full((size,), int(process.t_max)), cond).x0
        t, eps = torch.randint(20, 981, (size,)), torch.randn_like(z)
        with torch.no_grad():
            x_t = process.add_noise(x, eps, t)
            weight = process.sigma(t).square().float()[:, None, None, None]
            e_real, e_fake = (d.guided(x_t, t, cond, null, scale).eps for d in (real, fake))
        self.step("student", reduce(pseudo_target(x, variational_score_gradient(e_real, e_fake, weight=weight))))
        self.roles.train_only("fake_score")
        x, t, eps = x.detach(), torch.randint(0, 1000, (size,)), torch.randn_like(z)
        prediction = fake(process.add_noise(x, eps, t), t, cond)
        weight = process.alpha(t).square().float()[:, None, None, None]
        self.step("fake_score", reduce(denoising(prediction.eps, eps, weight=weight)))


def clock(action: object) -> float:
    start = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - start


def main(teacher: str = "fashion", pairs: int = 40, batch_size: int = 32, json_path: Path | None = None) -> None:
    method = SwiftBrush()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            method, Teacher.from_pretrained(teacher), output_dir=scratch, max_steps=10**6, batch_size=batch_size,
            save_every=10**6, validate_every=0, log_every=10, ema_decay=0.0,
        )  # fmt: skip
        trainer.start()
        bare = Bare(Teacher.from_pretrained(teacher), method, batch_size)
        for _ in range(5):
            trainer.advance()
            bare.iteration()
        ours: list[float] = []
        theirs: list[float] = []
        for i in range(pairs):
            for which in ("ours", "bare") if i % 2 else ("bare", "ours"):
                (ours if which == "ours" else theirs).append(clock(trainer.advance if which == "ours" else bare.iteration))
        trainer.close()
    ratios = torch.tensor([a / b for a, b in zip(ours, theirs, strict=True)])
    draws = ratios[torch.randint(len(ratios), (2000, len(ratios)), generator=torch.Generator().manual_seed(0))]
    low, high = draws.median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    row = {
        "median_ratio": round(ratios.median().item(), 4), "ci95": [round(low, 4), round(high, 4)], "pairs": pairs,
        "engine_ms": round(1000 * statistics.median(ours), 1), "bare_ms": round(1000 * statistics.median(theirs), 1),
        "batch_size": batch_size, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(row))
    if json_path:
        json_path.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
