"""Conversions between what networks predict."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import NoiseProcess, Prediction, process_from_scheduler, x0_from_output
from fastdiff.diffusion.prediction import output_from_x0
from fastdiff.diffusion.process import expand

TYPES = ["epsilon", "v_prediction", "sample"]
CONFIGS = {
    "stable diffusion": DDIMScheduler(**BETAS).config,
    "ddpm": DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").config,
    "zero terminal snr": DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction").config,
}


def every_time(config: dict) -> tuple[NoiseProcess, torch.Tensor]:
    process, _ = process_from_scheduler(config)
    t = torch.arange(1000)
    return process, t[(process.alpha(t) >= 1e-3) & (process.sigma(t) >= 1e-3)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("kind", TYPES)
def test_round_trip_at_every_time(kind: str, config: dict) -> None:
    process, t = every_time(config)
    assert len(t) >= 997
    output, x_t = normal(2, len(t), 3, 2)
    x0 = x0_from_output(output, x_t, t, process, kind)
    assert (output_from_x0(x0, x_t, t, process, kind) - output).abs().max() < 1e-12


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_true_noise_gives_back_the_true_sample(config: dict) -> None:
    process, t = every_time(config)
    x0, eps = normal(2, len(t), 3, 2)
    x_t = process.add_noise(x0, eps, t)
    a, s = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    for kind, output in {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}.items():
        assert (x0_from_output(output, x_t, t, process, kind) - x0).abs().max() < 1e-12
    prediction = Prediction(x_t, t, x0, process)
    assert (prediction.eps - eps).abs().max() < 1e-12
    assert (prediction.v - (a * eps - s * x0)).abs().max() < 1e-12
    assert (prediction.score + eps / s).abs().max() < 1e-10
    tweedie = (x_t + s.square() * prediction.score) / a
    assert (tweedie - x0).abs().max() < 1e-10


class Flow(NoiseProcess):
    """x_t = (1 - t) x0 + t eps: rho^2 = (1 - t)^2 + t^2 is not 1."""

    t_max = 1.0

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t.double()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t.double()


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_hold_for_processes_that_do_not_preserve_variance(kind: str) -> None:
    process, t = Flow(), torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)
    x0, eps = normal(2, 4, 3)
    x_t, a, s = process.add_noise(x0, eps, t), 1 - t[:, None], t[:, None]
    output = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]
    got = x0_from_output(output, x_t, t, process, kind)
    assert (got - x0).abs().max() < 1e-12
    assert (output_from_x0(got, x_t, t, process, kind) - output).abs().max() < 1e-12
    assert (Prediction(x_t, t, x0, process).score + eps / s).abs().max() < 1e-10


def test_v_prediction_at_zero_terminal_snr_is_finite() -> None:
    process, _ = process_from_scheduler(CONFIGS["zero terminal snr"])
    t, (v, x_t) = torch.tensor([999]), normal(2, 1, 4)
    x0 = x0_from_output(v, x_t, t, process, "v_prediction")
    assert torch.equal(x0, -v)
    assert torch.equal(Prediction(x_t, t, x0, process).eps, x_t)


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_outputs_are_converted_in_float32(kind: str) -> None:
    """In bfloat16 the division by alpha = 0.068 at t = 999 would make the sample wrong in its second digit."""
    process, _ = process_from_scheduler(CONFIGS["stable diffusion"])
    t = torch.tensor([999, 999, 20])
    output, x_t = normal(2, 3, 4).bfloat16()
    x0 = x0_from_output(output, x_t, t, process, kind)
    assert x0.dtype == torch.float32
    assert torch.equal(x0, x0_from_output(output.float(), x_t.float(), t, process, kind))


def test_gradient_of_an_epsilon_network_is_minus_sigma_over_alpha() -> None:
    process, _ = process_from_scheduler(CONFIGS["stable diffusion"])
    output = normal(3, 2).requires_grad_()
    t = torch.tensor([0, 500, 999])
    x0_from_output(output, normal(3, 2, seed=1), t, process, "epsilon").sum().backward()
    want = -(process.sigma(t) / process.alpha(t))[:, None].expand(3, 2)
    torch.testing.assert_close(output.grad, want, rtol=1e-12, atol=0)


def test_unknown_type_is_refused() -> None:
    process, _ = process_from_scheduler(CONFIGS["stable diffusion"])
    x, t = normal(1, 2), torch.tensor([1])
    for convert in (x0_from_output, output_from_x0):
        with pytest.raises(ValueError, match="'flow'"):
            convert(x, x, t, process, "flow")
