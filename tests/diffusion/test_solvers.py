"""Deterministic steps against diffusers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import (
    GaussianMixture,
    Prediction,
    ddim_sample,
    ddim_step,
    process_from_scheduler,
    trailing_times,
    x0_from_output,
)

PROCESS, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network of no particular meaning: smooth, and different at every time."""
    return torch.tanh(1.3 * x.roll(1, dims=-1) - x + t.double().reshape(-1, 1, 1).to(x) / 1000)


@pytest.mark.parametrize("n", [1, 4, 8, 25, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_trajectory_is_that_of_diffusers(kind: str, n: int) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    times = trailing_times(1000, n)
    ours = theirs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        batch = t.expand(3)
        assert times[i] == t
        theirs = scheduler.step(network(theirs, batch), t, theirs).prev_sample
        x0 = x0_from_output(network(ours, batch), ours, batch, PROCESS, kind)
        u = torch.tensor([times[i + 1]] * 3) if i + 1 < n else None
        ours = ddim_step(Prediction(ours, batch, x0, PROCESS), u)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_end_of_the_path_is_x0_and_not_the_first_row_of_the_table() -> None:
    """diffusers with set_alpha_to_one=False ends at abar_0 and keeps a little noise; here the end is x0 itself."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    x_t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 999])
    prediction = Prediction(x_t, t, x0_from_output(network(x_t, t), x_t, t, PROCESS, "epsilon"), PROCESS)
    assert ddim_step(prediction, None) is prediction.x0
    theirs = scheduler.step(network(x_t, t), 999, x_t).prev_sample
    torch.testing.assert_close(ddim_step(prediction, torch.tensor([0, 0])), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", range(1, 51))
def test_trailing_times_are_those_of_diffusers(n: int) -> None:
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    assert trailing_times(1000, n) == scheduler.timesteps.tolist()


def test_times_start_at_the_end_and_fall() -> None:
    assert trailing_times(1000, 4) == [999, 749, 499, 249]
    for n in range(1, 1001):
        times = trailing_times(1000, n)
        assert times[0] == 999
        assert len(times) == n
        assert times[-1] >= 0
        assert all(a > b for a, b in zip(times, times[1:], strict=False))


def test_ddim_of_a_single_gaussian_tends_to_its_flow_map() -> None:
    """PF-ODE of N(m, v): x_u = a_u m + sqrt(V_u / V_t) (x_t - a_t m); DDIM is first order, so halving the step halves the error."""
    m, v = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.25
    law = GaussianMixture(m, torch.tensor([v], dtype=torch.float64), torch.ones(1, dtype=torch.float64), PROCESS)
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s = PROCESS.alpha(torch.tensor(999)), PROCESS.sigma(torch.tensor(999))
    exact = m + (v / (a**2 * v + s**2)).sqrt() * (z - a * m)
    errors = [(ddim_sample(law, z, trailing_times(1000, n)) - exact).abs().max().item() for n in (20, 40, 80)]
    assert errors[-1] < 0.05
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in zip(errors, errors[1:], strict=False))


def inliers_and_distance(law: GaussianMixture, x: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Share within 4 std of a centre, and sliced 2-Wasserstein distance over 64 directions."""
    inlier = (x[:, None] - law.means).norm(dim=2).amin(1) < 4 * 0.15
    angle = torch.arange(64, dtype=torch.float64) * torch.pi / 64
    lines = torch.stack([angle.cos(), angle.sin()])
    gap = (x @ lines).sort(0).values - (real @ lines).sort(0).values
    return inlier.double().mean().item(), gap.square().mean().sqrt().item()


def test_more_ddim_steps_bring_the_exact_ring_closer() -> None:
    """Measured with 4,000 samples: inliers 0, 0.18, 0.75, 0.92, 0.98 and distances 1.29, 0.59, 0.20, 0.10, 0.09 (floor 0.07)."""
    ring, generator = GaussianMixture.ring(PROCESS), torch.Generator().manual_seed(0)
    real = ring.sample(2000, generator)
    z = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    results = [inliers_and_distance(ring, ddim_sample(ring, z, trailing_times(1000, n)), real) for n in (1, 2, 4, 8, 16)]
    inliers, distances = zip(*results, strict=True)
    assert inliers[0] == 0
    assert inliers[-1] > 0.95
    assert all(a < b for a, b in zip(inliers, inliers[1:], strict=False))
    assert distances[0] > 1.1
    assert distances[1] > 0.4
    assert distances[2] < 0.3
    assert distances[-1] < 0.15
