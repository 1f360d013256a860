"""What sCM's derivative costs: the training step of each estimator against that of two calls (a forward derivative and a forward).

A step is the student's forward, the derivative of F along a trajectory, and the backward; without teacher and optimiser, which are
the same for all. All estimators take turns on one batch; the figures are medians of paired ratios. Memory is the most that is
allocated at one time during a step beyond what stood before it, counted from the allocator's own events.

python eval/bench_jvp.py --rounds 20 --batch-size 16 --json-path docs/results/bench_jvp.json
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastdiff import Teacher
from fastdiff.diffusion.jvp import Function
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.files import aside
from fastdiff.losses import normalise_tangent, premultiplied_tangents, reduce, scm, scm_tangent
from fastdiff.models.denoiser import Denoiser
from fastdiff.trainers._tangents import Estimator, trigflow_network

ESTIMATORS = {
    "two calls": Estimator("forward"),
    "single call": Estimator("forward", single_call=True),
    "central": Estimator("central", step=1e-3),
    "one-sided": Estimator("one-sided", step=1e-3),
}


def transformer() -> tuple[nn.Module, Denoiser, tuple[int, ...], Tensor]:
    """A PixArt of four layers on 8x8 latents, under rectified flow."""
    network = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=1,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=64,
        caption_channels=32,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}

    def call(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        output: Tensor = network(x_t, timestep=t, encoder_hidden_states=cond, **extra)[0]
        return output

    return network, Denoiser(call, RectifiedFlow(), "flow_prediction"), (4, 8, 8), torch.randn(1, 16, 32)


def unet() -> tuple[nn.Module, Denoiser, tuple[int, ...], Tensor]:
    """The bundled teacher's."""
    teacher = Teacher.from_pretrained("fashion")
    network = teacher.family.backbone.requires_grad_(True)
    return network, teacher.denoiser, teacher.latent_shape, teacher.null


def step_of(
    network: nn.Module, function: Function, primals: tuple[Tensor, Tensor], velocity: Tensor
) -> Callable[[Estimator], None]:
    tangents = premultiplied_tangents(velocity, primals[1], sigma_data=1.0)

    def step(estimator: Estimator) -> None:
        prediction, frozen, jvp = estimator(function, primals, tangents)
        g = scm_tangent(primals[0], primals[1], frozen, velocity, jvp, sigma_data=1.0)
        reduce(scm(prediction, normalise_tangent(g))).backward()
        network.zero_grad()

    return step


def peak_mib(action: Callable[[], None]) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak / 2**20


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(build: Callable[[], tuple[nn.Module, Denoiser, tuple[int, ...], Tensor]], rounds: int, size: int) -> dict[str, dict]:
    torch.manual_seed(0)
    network, denoiser, shape, cond = build()
    y, velocity, t = torch.randn(size, *shape), torch.randn(size, *shape), torch.linspace(0.2, 1.4, size, dtype=torch.float64)
    function = trigflow_network(denoiser, 1.0, cond.expand(size, *cond.shape[1:]))
    step = step_of(network, function, (y, t), velocity)
    times: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for i in range(rounds + 2):
        for name in list(ESTIMATORS) if i % 2 else list(ESTIMATORS)[::-1]:
            spent = seconds(partial(step, ESTIMATORS[name]))
            if i >= 2:
                times[name].append(spent)
    memory = {name: peak_mib(partial(step, ESTIMATORS[name])) for name in ESTIMATORS}
    base = times["two calls"]
    return {
        name: {
            "ms": round(1000 * statistics.median(own), 1),
            "of_two_calls": round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 3),
            "mib": round(memory[name], 1),
        }
        for name, own in times.items()
    }


def main(rounds: int = 20, batch_size: int = 16, json_path: Path | None = None) -> None:
    row = {
        "unet": measure(unet, rounds, batch_size),
        "transformer": measure(transformer, rounds, batch_size),
        "rounds": rounds,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(row, indent=1))
    if json_path:
        with aside(json_path) as path:
            path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
