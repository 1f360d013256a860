"""DMD2's losses of four steps and DMDPipeline's (nvidia-modelopt 0.47) on the same modules and equal draws, in float64."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from short_runs import program

pytest.importorskip("modelopt", reason="pip install nvidia-modelopt")


@pytest.fixture(scope="module")
def bench() -> Any:
    return program("bench_cycle")


@pytest.mark.parametrize("rung", range(4))
def test_losses_and_gradients_are_those_of_dmdpipeline_at_every_rung(bench: Any, rung: int) -> None:
    """Its normaliser is of float32 also in float64, so the student's agree to that; the fake score's to the last bits."""
    found = bench.parity(rung)
    assert found.keys() == {"student loss", "student gradient", "fake_score loss", "fake_score gradient"}
    assert max(found["student loss"], found["student gradient"]) < 3e-7, version("nvidia-modelopt")
    assert max(found["fake_score loss"], found["fake_score gradient"]) < 1e-14


def test_the_floor_of_the_normaliser_is_the_one_difference_of_convention(bench: Any) -> None:
    """The gradient is off by 1e-6 / mean|x - x0_real| and the loss by twice that: here 1e-5, far above rounding."""
    found = bench.parity(0, same_floor=False)
    assert 1e-6 < found["student gradient"] < found["student loss"] < 1e-4
    assert found["fake_score loss"] < 1e-14


def test_hooks_count_26_forwards_on_our_side_and_35_on_theirs(bench: Any) -> None:
    flow = bench.Flow(bench.DMD2(steps=4, ratio=(1, 5)), 4)
    peer = bench.Peer(flow, bench.Separate(steps=4, ratio=(1, 5)))
    assert bench.count(flow, flow.cycles) == 26
    assert bench.count(flow, peer.cycles) == 35
    assert all(p.grad is None for module in flow.modules.values() for p in module.parameters())


def test_float32_agrees_to_six_digits(bench: Any) -> None:
    assert max(bench.parity(2, dtype=torch.float32).values()) < 1e-6
