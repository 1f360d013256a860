"""Noise processes read from scheduler configs."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from tiny import BETAS

from fastdiff.diffusion import DiscreteVP, process_from_scheduler
from fastdiff.diffusion.process import expand

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def stable_diffusion() -> DiscreteVP:
    process, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
    assert isinstance(process, DiscreteVP)
    return process


@pytest.mark.parametrize("betas", [BETAS, LINEAR, {"beta_schedule": "squaredcos_cap_v2"}])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_table_is_the_schedulers_own(kind: type, betas: dict) -> None:
    scheduler = kind(**betas)
    process, prediction_type = process_from_scheduler(scheduler.config)
    t = torch.arange(1000)
    assert prediction_type == "epsilon"
    assert (process.alpha(t).square() - scheduler.alphas_cumprod.double()).abs().max() < 1e-12
    assert (process.alpha(t).square() + process.sigma(t).square() - 1).abs().max() < 1e-15
    assert process.alpha(t).dtype == torch.float64


def test_scaled_linear_closed_form() -> None:
    process = stable_diffusion()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)
    t = torch.arange(1000)
    torch.testing.assert_close(process.alpha(t), abar.sqrt(), rtol=1e-5, atol=0)  # diffusers builds its table in float32
    last = torch.tensor(999)
    assert process.alpha(last).square().item() == pytest.approx(0.004660, abs=5e-7)
    assert (process.sigma(last) / process.alpha(last)).item() == pytest.approx(14.61, abs=5e-3)
    assert process.snr(last).item() == pytest.approx(0.004660 / (1 - 0.004660), rel=1e-4)
    assert process.t_max == 999
    assert torch.equal(process.network_time(t), t)


def test_trained_betas_and_table_length_are_read() -> None:
    betas = [0.1, 0.2, 0.4]
    process, _ = process_from_scheduler(DDPMScheduler(num_train_timesteps=3, trained_betas=betas).config)
    torch.testing.assert_close(
        process.alpha(torch.arange(3)).square(), torch.tensor([0.9, 0.72, 0.432]).double(), rtol=1e-6, atol=0
    )
    assert process.t_max == 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_read(prediction_type: str) -> None:
    config = DDIMScheduler(**BETAS, prediction_type=prediction_type).config
    assert process_from_scheduler(config)[1] == prediction_type


def test_zero_terminal_snr_is_read() -> None:
    scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    process, _ = process_from_scheduler(scheduler.config)
    assert process.alpha(torch.tensor(999)) == 0
    assert process.sigma(torch.tensor(999)) == 1
    assert (process.alpha(torch.arange(1000)).square() - scheduler.alphas_cumprod.double()).abs().max() < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        FlowMatchEulerDiscreteScheduler().config,
        EDMEulerScheduler().config,
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).config,
    ],
    ids=["flow", "edm", "flow in a VP scheduler"],
)
def test_other_processes_are_refused(config: dict) -> None:
    with pytest.raises(ValueError, match="no variance-preserving process"):
        process_from_scheduler(config)


@pytest.mark.parametrize(
    "table",
    [[0.9, 0.9, 0.5], [0.5, 0.9], [1.0, 0.5], [0.5, -0.1], [[0.9], [0.5]], [float("nan"), 0.5]],
    ids=["flat", "rising", "one", "negative", "matrix", "nan"],
)
def test_unordered_table_is_refused(table: list) -> None:
    with pytest.raises(ValueError, match="decreasing table"):
        DiscreteVP(torch.tensor(table))


@pytest.mark.parametrize("t", [torch.tensor(3.0), torch.tensor([0.5, 998.7])])
def test_float_time_is_not_truncated_to_a_row(t: torch.Tensor) -> None:
    process = stable_diffusion()
    for coefficient in (process.alpha, process.sigma):
        with pytest.raises(TypeError, match="integers"):
            coefficient(t)


@pytest.mark.parametrize("t", [-1, 1000])
def test_time_outside_the_table_is_refused(t: int) -> None:
    """t = -1 would read the last row: pure noise where no noise was meant."""
    process = stable_diffusion()
    with pytest.raises((IndexError, ValueError)):
        process.alpha(torch.tensor([t]))


def test_add_noise_per_sample_against_diffusers() -> None:
    scheduler, process = DDPMScheduler(**BETAS), stable_diffusion()
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 3, 2, generator=generator)
    t = torch.tensor([0, 20, 500, 980, 999])
    x_t = process.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, t), rtol=1e-6, atol=1e-6)
    assert x_t.dtype == torch.float32
    one = process.add_noise(x0[3:4], eps[3:4], t[3:4])
    assert torch.equal(one[0], x_t[3])


def test_values_broadcast_over_samples_and_not_over_the_last_axis() -> None:
    """[B] against [B, C, H, W] with W = B would scale columns instead of samples."""
    values, like = torch.tensor([1.0, 10.0, 100.0]), torch.ones(3, 2, 1, 3)
    scaled = expand(values, like) * like
    assert torch.equal(scaled, torch.stack([torch.full((2, 1, 3), v) for v in (1.0, 10.0, 100.0)]))
    assert (expand(torch.tensor(2.0, dtype=torch.float64), like) * like).dtype == torch.float32
