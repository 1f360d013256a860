"""Times to train and to sample at, against closed forms and diffusers' own grids."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from fastdiff.diffusion import times
from fastdiff.diffusion.process import EDM, RectifiedFlow, TrigFlow
from fastdiff.diffusion.schedulers import process_from_scheduler

N = 20_000


def u(n: int = N) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def z(n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mode_cdf(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """``P(s <= f(u)) = 1 - u`` for the falling map f, inverted on a fine grid of u."""
    grid = np.linspace(0, 1, 100_001)
    values = 1 - grid - scale * (np.cos(np.pi * grid / 2) ** 2 - 1 + grid)
    return lambda s: np.interp(s, values[::-1], 1 - grid[::-1])


@pytest.mark.parametrize(
    ("draws", "cdf"),
    [
        (lambda: times.uniform(u(), 0.1, 0.7), stats.uniform(0.1, 0.6).cdf),
        (lambda: times.logit_normal(z(), -0.5, 0.8), lambda s: stats.norm(-0.5, 0.8).cdf(np.log(s / (1 - s)))),
        (lambda: times.log_normal(z()), stats.lognorm(s=1.2, scale=math.exp(-1.2)).cdf),
        (lambda: times.trig_log_normal(z()), lambda t: stats.norm(-1.0, 1.4).cdf(np.log(0.5 * np.tan(t)))),
        (lambda: times.mode(u(), 1.29), mode_cdf(1.29)),
        (lambda: times.mode(u(), -0.9), mode_cdf(-0.9)),
    ],
    ids=["uniform", "logit normal", "log normal", "trig log normal", "mode", "negative mode"],
)
def test_law_of_the_times_is_its_closed_form(draws: Callable[[], torch.Tensor], cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    """Kolmogorov-Smirnov at 1e-6: were the seed not fixed, one false alarm in a million runs."""
    assert stats.kstest(draws().numpy(), cdf).pvalue > 1e-6


def test_mean_of_the_log_normal_is_not_negated() -> None:
    """A public code draws exp(-(mean + std z)): its median noise would be 3.3 instead of 0.30."""
    median, above = torch.zeros(1).double(), torch.ones(1).double()
    assert times.log_normal(median, -1.2, 1.2).item() == pytest.approx(math.exp(-1.2))
    assert times.log_normal(above, -1.2, 1.2).item() == pytest.approx(1.0)
    assert times.trig_log_normal(median, -1.0, 1.4).item() == pytest.approx(math.atan(math.exp(-1.0) / 0.5))
    assert times.logit_normal(median, 1.0).item() == pytest.approx(1 / (1 + math.exp(-1.0)))
    for rises in (times.log_normal, times.trig_log_normal, times.logit_normal):
        assert rises(above) > rises(median)


def test_one_law_of_noise_in_three_times() -> None:
    """A log-normal ratio is EDM's sigma, TrigFlow's tangent and, as a logit, the flow's odds."""
    sigma = times.log_normal(z(100), 0.3, 0.8)
    torch.testing.assert_close(EDM().nsr(sigma), RectifiedFlow().nsr(times.logit_normal(z(100), 0.3, 0.8)), rtol=1e-10, atol=0)
    angle = times.trig_log_normal(z(100), 0.3, 0.8, sigma_data=0.7)
    torch.testing.assert_close(TrigFlow(sigma_data=0.7).nsr(angle), sigma, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_is_diffusers_own_symmetric_and_falls(scale: float) -> None:
    theirs = compute_density_for_timestep_sampling("mode", 50, mode_scale=scale, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(times.mode(draws, scale), theirs, rtol=1e-6, atol=1e-6)
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    values = times.mode(grid, scale)
    assert (values[0].item(), values[-1].item()) == pytest.approx((1, 0), abs=1e-12)
    assert (values.diff() < 1e-12).all()
    torch.testing.assert_close(values + values.flip(0), torch.ones(1001).double(), rtol=0, atol=1e-12)


def test_density_of_mode_at_the_middle() -> None:
    ends = times.mode(torch.tensor([0.5 - 1e-5, 0.5 + 1e-5], dtype=torch.float64))
    assert 2e-5 / (ends[0] - ends[1]).item() == pytest.approx(1 / (1 + 1.29 * (1 - math.pi / 2)), rel=1e-6)


@pytest.mark.parametrize("scale", [-1.01, 1.76])
def test_mode_outside_its_scales_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"\[-1, 1\.7519\]"):
        times.mode(u(3), scale)


def test_every_element_of_a_grid_is_drawn_equally() -> None:
    """Chi-squared at 1e-6; and neither end of u falls off the grid."""
    grid = torch.tensor([999, 749, 499, 249])
    drawn = times.from_grid(u(), grid)
    counts = torch.stack([(drawn == value).sum() for value in grid])
    assert counts.sum() == N
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    ends = torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert times.from_grid(ends, grid).tolist() == [999, 749, 249]
    assert times.from_grid(torch.tensor([1 - 2**-24]).to(torch.float32), torch.arange(1000)).tolist() == [999]


def test_ends_of_uniform_times_may_differ_between_samples() -> None:
    low, high = torch.tensor([0.0, 250.0]).double(), torch.tensor([250.0, 1000.0]).double()
    assert times.uniform(torch.tensor([0.5, 0.5]).double(), low, high).tolist() == [125, 625]


def test_a_time_on_an_edge_is_the_start_of_the_segment_below() -> None:
    """In the segment above it would jump from the edge to itself: a consistency target that teaches nothing."""
    edges = torch.tensor([0, 250, 500, 1000])
    assert times.segment(torch.tensor([0, 1, 250, 251, 500, 999, 1000]), edges).tolist() == [0, 0, 0, 1, 1, 2, 2]
    t = times.uniform(u(), 0.0, 1000.0)
    index = times.segment(t, edges.double())
    assert ((edges[index] < t) & (t <= edges[index + 1])).all()


@pytest.mark.parametrize(
    ("t", "edges", "message"),
    [
        ([0.5], [1.0, 0.5, 0.0], "edges must rise"),
        ([0.5], [0.0, 0.5, 0.5, 1.0], "edges must rise"),
        ([0.5, 1.1], [0.0, 1.0], "outside the edges 0..1"),
        ([-0.1], [0.0, 1.0], "outside the edges 0..1"),
    ],
)
def test_times_of_no_segment_are_refused(t: list, edges: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        times.segment(torch.tensor(t), torch.tensor(edges))


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_karras_grid_is_diffusers_own(scheduler: type, n: int) -> None:
    theirs = scheduler(sigma_min=0.01, sigma_max=60.0, rho=6.0)
    theirs.set_timesteps(n)
    torch.testing.assert_close(times.karras_grid(n, 0.01, 60.0, 6.0), theirs.sigmas[:-1].double(), rtol=1e-6, atol=0)
    assert torch.equal(theirs.sigmas[-1], torch.tensor(0.0))


def test_shift_multiplies_the_ratio() -> None:
    flow, s = RectifiedFlow(), torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]).double()
    shifted = times.shift_time(s, 3.0)
    torch.testing.assert_close(flow.nsr(shifted[1:-1]), 3 * flow.nsr(s[1:-1]), rtol=1e-12, atol=0)
    assert (shifted[0].item(), shifted[-1].item()) == (0, 1)
    torch.testing.assert_close(times.unshift_time(shifted, 3.0), s, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(times.shift_time(times.shift_time(s, 2.0), 1.5), shifted, rtol=1e-12, atol=0)
    assert torch.equal(times.shift_time(s, 1.0), s)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9000])
def test_dynamic_shift_is_diffusers_own(tokens: int, kind: str) -> None:
    sizes = {"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 128, "max_image_seq_len": 8192}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **sizes)
    mu = calculate_shift(tokens, 128, 8192, 0.4, 1.3)
    process, _ = process_from_scheduler(scheduler)
    assert isinstance(process, RectifiedFlow)
    assert process.dynamic_shift is not None
    shift = times.dynamic_shift(tokens, **process.dynamic_shift)
    s = torch.tensor([0.01, 0.3, 0.5, 0.99, 1.0]).double()
    torch.testing.assert_close(times.shift_time(s, shift), scheduler.time_shift(mu, 1.0, s), rtol=1e-12, atol=0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=mu)  # as FluxPipeline does
    grid = times.shift_time(torch.linspace(1, 1 / 6, 6, dtype=torch.float64), shift)
    torch.testing.assert_close(grid, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
    scheduler.set_timesteps(6, mu=mu)
    torch.testing.assert_close(times.shift_time(times.flow_grid(6), shift), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_defaults_of_dynamic_shift_are_those_of_flux() -> None:
    for tokens in (256, 1024, 4096):
        assert times.dynamic_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)
    with pytest.raises(ValueError, match="'cubic'"):
        times.dynamic_shift(256, time_shift_type="cubic")


@pytest.mark.parametrize("n", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1000, 500])
def test_flow_grid_is_diffusers_own(steps: int, shift: float, n: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=steps)
    scheduler.set_timesteps(n)
    ours = times.flow_grid(n, shift, num_train_timesteps=steps)
    torch.testing.assert_close(ours, scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        RectifiedFlow(num_train_timesteps=steps).network_time(ours), scheduler.timesteps.double(), rtol=1e-6, atol=0
    )


def test_grid_of_the_flow_multistep_solvers_is_a_shifted_line_too() -> None:
    """UniPC and DPM-Solver leave out 1/T, which they divide the line to, and shift it once; UniPC moves 1 by 1e-6."""
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(6)
    line = torch.linspace(1, 1 / 1000, 7, dtype=torch.float64)[:-1]
    torch.testing.assert_close(times.shift_time(line, 3.0), scheduler.sigmas[:-1].double(), rtol=2e-6, atol=0)


def test_icts_interval_weights_are_the_normal_laws_of_log_sigma() -> None:
    grid = times.karras_grid(41)
    weights = times.log_normal_weights(grid)
    normal = stats.norm(-1.1, 2.0)
    want = -np.diff(normal.cdf(grid.log().numpy()))
    np.testing.assert_allclose(weights.numpy(), want / want.sum(), rtol=1e-12)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_indices_come_as_often_as_their_weights_say_and_never_fall_out() -> None:
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.bincount(times.from_weights(even, weights), minlength=4).tolist() == [1000, 0, 6000, 3000]
    assert times.from_weights(torch.tensor([0.0, 1.0]).double(), weights).tolist() == [0, 3]


def test_cts_curriculum_begins_and_ends_where_the_paper_says() -> None:
    total = 1000
    counts = [times.consistency_intervals(k, total) for k in range(total + 1)]
    assert (counts[0], counts[-1]) == (2, 151)
    assert all(0 <= b - a <= 60 for a, b in zip(counts, counts[1:], strict=False))
    assert times.consistency_ema(2) == pytest.approx(0.9)
    assert times.consistency_ema(151) == pytest.approx(0.9 ** (2 / 151))


def test_icts_curriculum_doubles_on_an_even_schedule() -> None:
    counts = [times.doubling_intervals(k, 800) for k in range(800)]
    assert sorted(set(counts)) == [10 * 2**i + 1 for i in range(8)]
    assert all(counts.count(n) == 100 for n in set(counts))
    assert times.doubling_intervals(800, 800) == 1281
