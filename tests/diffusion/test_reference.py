"""The integrated probability-flow ODE of mixtures and point clouds."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import GaussianMixture, process_from_scheduler
from fastdiff.diffusion.exact import PointCloud
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.reference import reference_flow_map

VP, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_all_processes_share_one_ode() -> None:
    """The same state at the same noise-to-signal ratio ends at the same sample: VP's times 999 and 300 as every other process'."""
    law, x = GaussianMixture.classes(VP), normal(4, 2)
    t, u = torch.tensor(999), torch.tensor(300)
    wanted = reference_flow_map(law, x, t, u)
    others: list[NoiseProcess] = [EDM(), RectifiedFlow(), TrigFlow(sigma_data=0.5)]
    for process in others:
        t_other, u_other = process.t_from_nsr(VP.nsr(t)), process.t_from_nsr(VP.nsr(u))
        got = reference_flow_map(law.under(process), process.norm(t_other) * x, t_other, u_other) / process.norm(u_other)
        assert (got - wanted).abs().max() < 1e-7


def test_trajectories_compose_and_go_back() -> None:
    law, x = GaussianMixture.ring(EDM()), 5 * normal(4, 2)
    late, middle = torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([0.5, 0.4, 0.6, 0.2])  # one start and end a sample
    half = reference_flow_map(law, x, late, middle)
    assert (reference_flow_map(law, half, middle, None) - reference_flow_map(law, x, late, None)).abs().max() < 1e-6
    assert (reference_flow_map(law, half, middle, late) - x).abs().max() < 1e-6
    alone = torch.cat([reference_flow_map(law, x[i : i + 1], late[i], middle[i]) for i in range(4)])
    assert (half - alone).abs().max() < 1e-7


def test_tightening_the_tolerance_changes_less_than_the_documented_error() -> None:
    law, x, t = GaussianMixture.ring(RectifiedFlow()), normal(16, 2), torch.tensor(1.0)
    coarse, fine = reference_flow_map(law, x, t, None), reference_flow_map(law, x, t, None, rtol=1e-12)
    assert (coarse - fine).abs().max() < 1e-7


def test_two_points_are_reached_in_finite_time() -> None:
    """Two points at +-1 split space by the sign of the state; a trajectory ends on one although its eps stays of order 1."""
    cloud = PointCloud(torch.tensor([[-1.0], [1.0]]), TrigFlow(sigma_data=0.5))
    x = 0.5 * torch.tensor([[-2.0], [-0.1], [0.3], [1.5]]).double()
    end = reference_flow_map(cloud, x, torch.tensor(math.pi / 2).double(), None)
    assert (end - x.sign()).abs().max() < 1e-6


def test_condition_reaches_the_law() -> None:
    law, x = GaussianMixture.classes(EDM()), 80 * normal(30, 2)
    cond = torch.arange(3).repeat(10)
    end = reference_flow_map(law, x, torch.tensor(80.0), None, cond, rtol=1e-6)
    assert torch.equal(law.labels[law.mode_of(end)], cond)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=["edm", "flow"])
def test_trajectories_carry_noise_to_the_law(process: NoiseProcess) -> None:
    """512 trajectories: mode masses to 4.5 binomial standard errors, a false alarm in 1e4 runs were the seed not fixed."""
    law, n = GaussianMixture.classes(process), 512
    t = torch.tensor(process.t_max)
    x = reference_flow_map(law, process.initial_scale * normal(n, 2), t, None, rtol=1e-6)
    mode = law.mode_of(x)
    share = mode.bincount(minlength=8) / n
    assert ((share - law.weights).abs() < 4.5 * (law.weights * (1 - law.weights) / n).sqrt()).all()
    distance = (x - law.means[mode]).square().sum(1) / law.variances[mode]  # chi-squared with 2 degrees: mean 2, variance 4
    assert distance.mean().item() == pytest.approx(2, abs=4.5 * 2 / n**0.5)
