"""What the rollout pool saves: cycles of five fake-score updates and one of the student, against a rollout for each loss.

    engine      the Trainer with DMD2 of four steps, against the Trainer with the same losses on simulations of their own
    modelopt    those losses in a bare loop, against DMDPipeline of nvidia-modelopt on the same modules; only where it is
                installed, and only after losses and gradients were found equal on equal draws, in float64

Both sides take turns, two cycles at a time, over which the rungs of separate simulations are balanced, so that their rollouts
cost (K - 1) / 2 = 1.5 calls on average. Prints the median of the paired ratios with a bootstrap interval, and what each side
counted in N, network passes of one batch with a backward as two: a side that is faster by doing less shows as such.

pip install nvidia-modelopt && python eval/bench_cycle.py --pairs 40 --batch-size 32 --json-path docs/results/bench_cycle.json
"""

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from fastdiff import Teacher, Trainer
from fastdiff.data.prompts import PromptTable, cycled
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.diffusion.renoising import consistency_step
from fastdiff.eval.report import environment
from fastdiff.files import aside
from fastdiff.losses import distribution_matching_gradient
from fastdiff.models.roles import Roles
from fastdiff.trainers import DMD2, dmd2
from fastdiff.trainers.draws import Draws, generator_for
from fastdiff.trainers.method import Batch
from fastdiff.trainers.rollout import ROLLOUT
from fastdiff.trainers.trajectory import trajectory

STEPS, USES, CYCLES = 4, 5, 2
GRID = torch.arange(1, 1001, dtype=torch.float64) / 1024
"""Times that float32 holds exactly, 1000 t too: both codes give the networks the same number."""


class Separate(DMD2):
    """Every loss simulates a batch of its own up to a rung of its own, one for the batch: as DMDPipeline and LightX2V do."""

    def updates(self, step: int) -> tuple[str, ...]:
        return tuple(update for update in super().updates(step) if update != ROLLOUT)

    def rung(self, step: int, loss: str) -> int:
        """Random, and balanced over the losses of ``CYCLES`` cycles."""
        group, place = divmod(step, CYCLES * USES)
        order = cycled(STEPS, CYCLES * (USES + 1), generator_for(0, group, "rungs"))
        return int(order[place + place // USES + (loss == "student")])

    def _generate(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        return self._simulate(batch, roles, "student")

    @torch.no_grad()
    def _generated(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        return self._simulate(batch, roles, "fake_score")

    def _simulate(self, batch: Batch, roles: Roles, loss: str) -> tuple[Tensor, Any]:
        rung, levels, student = self.rung(batch.draws.key[2], loss), self.levels(), roles.denoiser("student")
        noise = [batch.noise(f"{loss}_z_{i}") for i in range(rung + 1)]
        t = student.process.at_level(torch.full((len(batch),), levels[rung]))
        with torch.no_grad():
            made = trajectory(student, noise[0], batch.cond, levels[:rung], self.sampler, noise.__getitem__)
        x_t = consistency_step(made[-1], t, noise[rung]) if made else student.process.initial_scale * noise[0]
        return student(x_t, t, batch.cond).x0, batch.cond


class Engine:
    """A method in the real Trainer."""

    def __init__(self, method: DMD2, teacher: str, folder: str, size: int, *, stepping: bool) -> None:
        self.size = size
        self.trainer = Trainer(
            method, Teacher.from_pretrained(teacher), output_dir=folder, max_steps=10**6, batch_size=size, save_every=10**6,
            validate_every=0, log_every=10**6, ema_decay=0.0,
        )  # fmt: skip
        self.trainer.start()
        if not stepping:
            for optimizer in self.trainer._optimizers.values():
                optimizer.step = lambda: None

    def cycles(self) -> None:
        for _ in range(CYCLES * USES):
            self.trainer.advance()

    def forwards(self) -> float:
        """N in a cycle, by the ledger of all cycles so far."""
        roles = self.trainer._roles
        samples = sum(roles.ledger.values()) + 2 * sum(roles.backwards.values())
        return samples * USES / (self.size * self.trainer._step)


class Flow:
    """A small flow transformer of diffusers as teacher, student and fake score, and DMD2's losses on them in a bare loop."""

    def __init__(self, method: DMD2, size: int, *, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        module = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, num_layers=4, num_cross_attention_heads=4,
            cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=32, sample_size=8, patch_size=1,
        ).to(dtype)  # fmt: skip
        captions = torch.randn(11, 8, 32, dtype=dtype)
        self.teacher = Teacher.from_module(
            module, RectifiedFlow(), "flow_prediction", shape=(4, 8, 8), prompts=[str(i) for i in range(10)], call=_call,
            encode=lambda prompts: captions[[int(prompt or -1) for prompt in prompts]],
        )  # fmt: skip
        self.method, self.size, self.step = method, size, 0
        self.roles, self.prompts = Roles(self.teacher, method.roles()), PromptTable(self.teacher.prompts or [], self.teacher)
        self.modules = {name: self.roles.backbone(name) for name in ("student", "teacher", "fake_score")}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name in method.roles():
            for p in self.roles.parameters(name):
                p.data += 0.02 * torch.randn_like(p)  # off the point at which all three are equal

    def batch(self, step: int) -> Batch:
        return Batch(Draws(0, 0, step, size=self.size, part=slice(self.size)), self.prompts, self.teacher)

    def learn(self, name: str, loss: Callable[[], Tensor]) -> None:
        self.roles.train_only(name)
        loss().backward()
        if name in self.optimizers:
            self.optimizers[name].step()
        for p in self.roles.parameters(name):
            p.grad = None

    def loss(self, name: str, batch: Batch) -> Tensor:
        return torch.stack(list(self.method.loss(name, batch, self.roles).values())).sum()

    def cycles(self) -> None:
        for _ in range(CYCLES * USES):
            batch = self.batch(self.step)
            for update in self.method.updates(self.step):
                if update == ROLLOUT:
                    self.method.loss(update, batch, self.roles)
                else:
                    self.learn(update, partial(self.loss, update, batch))
            self.step += 1


def _call(module: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    out: Tensor = module(hidden_states=x_t, timestep=t.to(x_t), encoder_hidden_states=cond).sample
    return out


class Peer:
    """The same losses by ``modelopt.torch.fastgen.DMDPipeline``, on the modules of a ``Flow``, with the rungs of ``Separate``.

    It draws the rung from torch's global generator: each loss starts from a seed that gives the wanted one.
    """

    def __init__(self, flow: Flow, rungs: Separate) -> None:
        import modelopt.torch.fastgen as fastgen

        self.flow, self.rungs, self.step = flow, rungs, 0
        self.seeds = {int(torch.randint(0, STEPS, (1,), generator=torch.Generator().manual_seed(seed))): seed for seed in range(50)}
        times = {"time_dist_type": "polynomial", "min_t": GRID[0].item(), "max_t": GRID[-1].item()}
        config = fastgen.DMDConfig(
            pred_type="flow", fake_score_pred_type="flow", num_train_timesteps=1000, guidance_scale=flow.method.guidance_scale,
            student_sample_steps=STEPS, student_sample_type="sde", backward_simulation=True,
            sample_t_cfg=fastgen.SampleTimestepConfig(**times, t_list=[1 - i / STEPS for i in range(STEPS + 1)]),
        )  # fmt: skip
        modules = flow.modules
        self.pipeline = fastgen.DMDPipeline(modules["student"], modules["teacher"], modules["fake_score"], config)

    def loss(self, name: str, noise: Tensor, batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)
        if name == "student":
            return self.pipeline.compute_student_loss(noise, noise, batch.cond, negative_encoder_hidden_states=batch.null)["total"]
        return self.pipeline.compute_fake_score_loss(noise, noise, batch.cond)["total"]

    def cycles(self) -> None:
        shape = (self.flow.size, *self.flow.teacher.latent_shape)
        for step in range(self.step, self.step + CYCLES * USES):
            batch = self.flow.batch(step)
            for name in self.rungs.updates(step):
                noise, seed = torch.randn(shape), self.seeds[self.rungs.rung(step, name)]
                self.flow.learn(name, partial(self.loss, name, noise, batch, seed))
        self.step += CYCLES * USES


def with_added_floor(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """DMD's gradient as DMDPipeline normalises it: over mean|x - x0_real| + 1e-6, where ours is over max(.., 1e-6)."""
    gap = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return distribution_matching_gradient(x, x0_real, x0_fake) * gap / (gap + 1e-6)


def parity(rung: int, *, same_floor: bool = True, size: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Relative differences of losses and of gradients (norm of the difference) on equal draws, at one rung.

    One convention differs, the floor of G's normaliser: see ``with_added_floor``, which ``same_floor`` puts in the place of ours.
    """
    gradient = with_added_floor if same_floor else distribution_matching_gradient
    with patch.object(dmd2, "distribution_matching_gradient", gradient):
        return _differences(rung, size, dtype)


def _differences(rung: int, size: int, dtype: torch.dtype) -> dict[str, float]:
    method = Separate(steps=STEPS, ratio=(1, USES))
    method.rung = lambda step, loss: rung  # type: ignore[method-assign]
    flow = Flow(method, size, dtype=dtype)
    peer, found = Peer(flow, method), dict[str, float]()
    for name in ("student", "fake_score"):
        batch, noise = flow.batch(0), torch.randn(size, *flow.teacher.latent_shape, dtype=dtype)
        drawn, t = replay(name, peer.seeds[rung], noise)
        batch.noise, method.times = drawn.__getitem__, lambda name, batch, t=t: t  # type: ignore[method-assign, assignment, misc]
        flow.roles.train_only(name)
        both = []
        for loss in (flow.loss(name, batch), peer.loss(name, noise, batch, peer.seeds[rung])):
            gradient = torch.autograd.grad(loss, flow.roles.parameters(name), materialize_grads=True)
            both.append((loss.detach(), torch.cat([g.flatten() for g in gradient])))
        for what, a, b in zip(("loss", "gradient"), *both, strict=True):
            found[f"{name} {what}"] = float((a - b).norm() / b.norm())
    return found


def replay(loss: str, seed: int, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What DMDPipeline draws after ``seed``, in its order, by the names of our draws: rung, simulation, times, noise."""
    torch.manual_seed(seed)
    rung = int(torch.randint(0, STEPS, (1,)))
    rollout = [*(torch.randn_like(noise) for _ in range(rung)), noise]  # the caller's noise is the last of them
    t = GRID[torch.randint(0, len(GRID), (len(noise),))]
    named = {f"{loss}_z_{i}": z for i, z in enumerate(rollout)}
    return named | {"student_eps" if loss == "student" else "fake_eps": torch.randn_like(noise)}, t


def count(flow: Flow, cycles: Callable[[], None]) -> float:
    """N in a cycle, by hooks on the modules: an output with a graph will be gone back through, which counts two."""
    passes: list[int] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Tensor], out: Any) -> None:
        passes.append(len(kwargs["hidden_states"]) * (3 if out.sample.requires_grad else 1))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in flow.modules.values()]
    cycles()
    for handle in handles:
        handle.remove()
    return sum(passes) / (flow.size * CYCLES)


def clock(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def paired(facts: dict[str, Any], first: Callable[[], None], second: Callable[[], None], pairs: int) -> dict[str, Any]:
    """Both in turn, the first one alternating: the median of first / second with a bootstrap 95 % interval, and raw ms a cycle."""
    seconds: list[tuple[float, float]] = []
    for i in range(pairs):
        a, b = (clock(first), clock(second)) if i % 2 else reversed((clock(second), clock(first)))
        seconds.append((a, b))
    ratios = torch.tensor([a / b for a, b in seconds])
    draws = ratios[torch.randint(pairs, (2000, pairs), generator=torch.Generator().manual_seed(0))]
    interval = draws.median(dim=1).values.quantile(torch.tensor([0.025, 0.975]))
    ms = [round(1000 * statistics.median(side) / CYCLES, 1) for side in zip(*seconds, strict=True)]
    row = facts | {"median_ratio": round(statistics.median(ratios.tolist()), 4), "ci95": [round(x, 4) for x in interval.tolist()]}
    row |= {"ms_a_cycle": ms, "pairs": pairs}
    print(json.dumps(row), flush=True)
    return row


def bench_engine(teacher: str, pairs: int, size: int) -> list[dict[str, Any]]:
    rows = []
    for stepping in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            methods = DMD2(steps=STEPS, ratio=(1, USES)), Separate(steps=STEPS, ratio=(1, USES))
            sides = [Engine(m, teacher, f"{folder}/{i}", size, stepping=stepping) for i, m in enumerate(methods)]
            for side in sides:
                side.cycles()
            facts = {"part": "engine", "sides": ["pool", "separate"], "teacher": teacher, "batch_size": size, "optimizer": stepping}
            facts["forwards_a_cycle"] = [side.forwards() for side in sides]
            rows.append(paired(facts, sides[0].cycles, sides[1].cycles, pairs))
            for side in sides:
                side.trainer.close()
    return rows


def bench_modelopt(pairs: int, size: int) -> list[dict[str, Any]]:
    worst = max(value for rung in range(STEPS) for value in parity(rung).values())
    if worst > 1e-6:
        raise SystemExit(f"losses or gradients differ from DMDPipeline's by {worst:.1e}: times of different losses mean nothing.")
    rows = []
    for ours in (DMD2(steps=STEPS, ratio=(1, USES)), Separate(steps=STEPS, ratio=(1, USES))):
        for stepping in (False, True):
            flow = Flow(ours, size)
            peer = Peer(flow, Separate(steps=STEPS, ratio=(1, USES)))
            if stepping:
                flow.optimizers = {name: torch.optim.AdamW(flow.roles.parameters(name), lr=1e-5) for name in ours.roles()}
            sides = ["pool" if type(ours) is DMD2 else "separate", "DMDPipeline"]
            facts = {"part": "modelopt", "sides": sides, "batch_size": size, "optimizer": stepping, "parity": worst}
            facts["forwards_a_cycle"] = [count(flow, side.cycles) for side in (flow, peer)]
            rows.append(paired(facts, flow.cycles, peer.cycles, pairs))
    return rows


def main(teacher: str = "fashion", pairs: int = 20, batch_size: int = 32, json_path: Path | None = None) -> None:
    rows = bench_engine(teacher, pairs, batch_size)
    if importlib.util.find_spec("modelopt"):
        rows += bench_modelopt(pairs, batch_size)
    else:
        print("nvidia-modelopt is not installed: only the engine was measured")
    if json_path:
        with aside(json_path) as target:
            target.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
