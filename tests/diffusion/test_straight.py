"""Lines that are straight for every process at once, their times, and the straightness of a sampler."""

import pytest
import torch

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.matching import SNRMatched, match_state
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.solvers import ddim_step, euler_step, sample
from fastdiff.diffusion.straight import flow_time, flow_velocity, flow_weight, straightness, uniform_in_flow_time
from fastdiff.losses.weights import convert_weight
from fastdiff.proof import laws

PROCESSES = {"vp": laws.process(), "edm": EDM(), "flow": RectifiedFlow(), "trigflow": TrigFlow()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_process
def test_a_ddim_step_of_any_process_is_an_euler_step_of_the_flow(process: NoiseProcess) -> None:
    """So the stock schedulers of both make the same samples of the same lines."""
    flow, law, x = RectifiedFlow(), GaussianMixture.ring(process), normal(6, 2)
    t, u = (process.at_level(torch.full((6,), level)) for level in (700, 300))
    stepped = ddim_step(law(x, t), u)
    y, s = match_state(x, t, process, flow)
    v = flow_time(process, u)
    assert torch.allclose(s, flow_time(process, t), rtol=1e-12, atol=0)
    euler = euler_step(SNRMatched(law, flow)(y, s), v)
    assert torch.allclose(euler, stepped / expand(process.alpha(u) + process.sigma(u), x), rtol=1e-9, atol=1e-9)


@each_process
def test_a_line_is_straight_in_flow_time_and_over_the_noise_to_signal_ratio(process: NoiseProcess) -> None:
    x_start, x0 = normal(4, 3), normal(4, 3, seed=1)
    start = process.at_level(torch.full((4,), 900))
    line = Prediction(x_start, start, x0, process)
    assert torch.allclose(ddim_step(line, start), x_start, rtol=0, atol=1e-12)
    at = [process.at_level(torch.full((4,), level)) for level in (900, 500, 200)]
    for scale, coordinate in (
        (lambda t: process.alpha(t) + process.sigma(t), lambda t: flow_time(process, t)),
        (process.alpha, process.nsr),
    ):
        points = [ddim_step(line, t) / expand(scale(t), x0) for t in at]
        a, b, c = (coordinate(t)[0] for t in at)
        assert torch.allclose(points[1], points[2] + (b - c) / (a - c) * (points[0] - points[2]), rtol=1e-9, atol=1e-9)
    v = flow_velocity(line)
    one, two = (ddim_step(line, t) / expand(process.alpha(t) + process.sigma(t), x0) for t in at[:2])
    assert torch.allclose((one - two) / expand(flow_time(process, at[0]) - flow_time(process, at[1]), v), v, rtol=1e-9, atol=1e-9)


@each_process
def test_the_weighted_error_of_x0_is_the_error_of_the_velocity(process: NoiseProcess) -> None:
    x_t, t = normal(5, 3), process.at_level(torch.tensor([0, 100, 500, 900, 999]))
    right, wrong = (Prediction(x_t, t, normal(5, 3, seed=seed), process) for seed in (1, 2))
    of_x0 = expand(flow_weight(process, t), x_t) * (right.x0 - wrong.x0).square()
    of_u = (flow_velocity(right) - flow_velocity(wrong)).square()
    finite = process.alpha(t) > 0
    assert torch.allclose(of_x0[finite], of_u[finite], rtol=1e-9, atol=0)
    a, s = process.alpha(t), process.sigma(t)
    convert = convert_weight(1.0, a, s, source="flow_prediction", target="sample", wronskian=a + s)
    assert torch.allclose(flow_weight(process, t), convert, rtol=1e-12, atol=0)


@each_process
def test_times_are_uniform_in_flow_time_and_reach_both_ends(process: NoiseProcess) -> None:
    low, high = (flow_time(process, process.at_level(torch.tensor(level))) for level in (0, 999))
    u = (torch.arange(20_000, dtype=torch.float64)) / 20_000
    t = uniform_in_flow_time(process, u, low, high)
    assert t.max().item() == pytest.approx(process.at_level(torch.tensor(999)).item(), rel=1e-12)
    s = flow_time(process, t)
    edges = low + (high - low) * torch.linspace(0, 1, 11, dtype=torch.float64)
    shares = torch.histogram(s.clamp(low, high), edges)[0] / len(s)
    assert (shares - 0.1).abs().max() < 2e-3
    rows = flow_time(process, process.at_level(torch.arange(1000)))
    within_a_row = rows.diff().max() if not t.is_floating_point() else 1e-9
    assert (s - (high - (high - low) * u)).abs().max() <= within_a_row


class Straight:
    """Says the end of the exact line through x_t for an affine coupling: x0 = k x_T."""

    def __init__(self, process: NoiseProcess, k: float) -> None:
        self.process, self.k = process, k
        self.start = process.at_level(torch.tensor(999))

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        a, s = (expand(c(t), x_t) for c in (self.process.alpha, self.process.sigma))
        ratio = s * (1 - self.process.alpha(self.start) * self.k) / self.process.sigma(self.start)
        return Prediction(x_t, t, self.k * x_t / (a * self.k + ratio), self.process)


@each_process
def test_straightness_is_zero_on_straight_paths_alone(process: NoiseProcess) -> None:
    x, times = process.initial_scale * normal(8, 2), process.at_level(torch.tensor([999, 749, 499, 249]))
    straight = Straight(process, 0.3)
    assert straightness(straight, x, times).max() < 1e-18
    assert torch.allclose(sample(straight, x, times), 0.3 * x, rtol=1e-9, atol=0)
    assert torch.allclose(sample(straight, x, times[:1]), 0.3 * x, rtol=1e-9, atol=0)
    assert straightness(GaussianMixture.ring(process), x, times).min() > 1e-4


def test_straightness_of_a_gaussian_is_its_integral() -> None:
    """Under the flow, u of N(0, v) at x_s = sqrt(V_s) c is ``c (s - (1 - s) v) / sqrt(V_s)`` and the line's ``c (1 - sqrt(v))``."""
    process, v = RectifiedFlow(), 0.25
    law = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), v, dtype=torch.float64), process)
    n = 1000
    times = torch.arange(n, 0, -1, dtype=torch.float64) / n
    c = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    s = times - 0.5 / n
    root = ((1 - s) ** 2 * v + s**2).sqrt()
    want = ((s - (1 - s) * v) / root - (1 - v**0.5)).square().mean() * c[:, 0].square()
    assert torch.allclose(straightness(law, c, times), want, rtol=5e-3, atol=0)
