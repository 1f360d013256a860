"""Conversions between what networks predict."""

from itertools import permutations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion.prediction import (
    PREDICTION_TYPES,
    Prediction,
    convert,
    input_scale,
    output_from_x0,
    x0_from_output,
)
from fastdiff.diffusion.process import EDM, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.schedulers import process_from_scheduler

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


def processes() -> dict[str, tuple[NoiseProcess, torch.Tensor]]:
    """Every process, with times from alpha = 1e-3 to sigma = 1e-3."""
    vp, _ = process_from_scheduler(CONFIGS["stable diffusion"])
    assert isinstance(vp, DiscreteVP)
    return {
        "discrete vp": (vp, torch.tensor([0, 1, 20, 500, 980, 999])),
        "continuous vp": (vp.continuous(), torch.tensor([0.0, 0.4, 20.3, 500.5, 998.9, 999.0]).double()),
        "edm": (EDM(), torch.tensor([0.002, 0.01, 0.5, 7.0, 80.0]).double()),
        "flow": (RectifiedFlow(), torch.tensor([0.001, 0.3, 0.5, 0.7, 0.999]).double()),
        "trigflow": (TrigFlow(), torch.tensor([0.002, 0.3, 0.8, 1.3, torch.pi / 2 - 0.001]).double()),
    }


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


@pytest.mark.parametrize(("source", "target"), permutations(PREDICTION_TYPES, 2))
def test_every_pair_of_types_there_and_back(source: str, target: str) -> None:
    """Outputs of unit size, but scores of the size 1 / sigma that scores have: less of one would be lost in x0's last digits."""
    for process, t in processes().values():
        output, x_t = normal(2, len(t), 3, 2)
        if source == "score":
            output = output / expand(process.sigma(t), output)
        there = convert(output, x_t, t, process, source, target)
        back = convert(there, x_t, t, process, target, source)
        assert ((back - output).flatten(1).norm(dim=1) < 1e-12 * output.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_all_types_agree_on_one_sample_and_noise(name: str) -> None:
    """The relations of the true (x0, eps), each written out: a pair of wrong inverses would pass any round trip."""
    for process, t in processes().values():
        x0, eps = normal(2, len(t), 3)
        a, s, da, ds = (f(t)[:, None] for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
        d = process.sigma_data
        x_t, q = a * x0 + s * eps, (a.square() * d**2 + s.square()).sqrt()
        truth = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": a * eps - s * x0,
            "flow_prediction": da * x0 + ds * eps,
            "score": -eps / s,
            "edm": (s * x0 - a * d**2 * eps) / (d * q),
            "trigflow": (a * d**2 * eps - s * x0) / (d * q),
        }[name]
        torch.testing.assert_close(x0_from_output(truth, x_t, t, process, name), x0, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output_from_x0(x0, x_t, t, process, name), truth, rtol=1e-9, atol=1e-9)


def test_edm_is_that_of_the_paper() -> None:
    """``D = c_skip x + c_out F(c_in x, c_noise)`` (table 1), whose regression target is ``(x0 - c_skip x) / c_out``."""
    process, sigma, sd = EDM(sigma_data=0.7), torch.tensor([0.002, 0.5, 7.0, 80.0]).double(), 0.7
    f, x, x0 = normal(3, 4, 5)
    c_skip = (sd**2 / (sigma**2 + sd**2))[:, None]
    c_out = (sigma * sd / (sigma**2 + sd**2).sqrt())[:, None]
    torch.testing.assert_close(x0_from_output(f, x, sigma, process, "edm"), c_skip * x + c_out * f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output_from_x0(x0, x, sigma, process, "edm"), (x0 - c_skip * x) / c_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(input_scale(process, sigma, "edm"), (sigma**2 + sd**2).rsqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_trigflow_is_that_of_the_paper(sd: float) -> None:
    """``f = cos t x - sin t sd F``, the PF-ODE ``dx/dt = sd F``, the target ``cos t z - sin t x0`` and the score of F."""
    process, t = TrigFlow(sigma_data=sd), torch.tensor([0.01, 0.4, 1.1, 1.57]).double()
    f, x = normal(2, 4, 5)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    x0 = x0_from_output(f, x, t, process, "trigflow")
    torch.testing.assert_close(x0, cos * x - sin * sd * f, rtol=1e-12, atol=1e-12)
    prediction = Prediction(x, t, x0, process)
    torch.testing.assert_close(prediction.velocity, sd * f, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sd * prediction.eps, sin * x + cos * sd * f, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prediction.score, -(cos * sd * f + sin * x) / (sd**2 * sin), rtol=1e-10, atol=1e-10)
    z, sample = sd * normal(4, 5, seed=1), normal(4, 5, seed=2)
    true = Prediction(cos * sample + sin * z, t, sample, process)
    torch.testing.assert_close(sd * true.trigflow, cos * z - sin * sample, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(input_scale(process, t, "trigflow"), torch.full((4,), 1 / sd).double(), rtol=1e-12, atol=0)


def test_flow_is_that_of_the_paper() -> None:
    """``x0 = x - s u`` and ``eps = x + (1 - s) u``, where u = eps - x0."""
    process, s = RectifiedFlow(), torch.tensor([0.01, 0.3, 0.99]).double()
    u, x = normal(2, 3, 5)
    x0 = x0_from_output(u, x, s, process, "flow_prediction")
    torch.testing.assert_close(x0, x - s[:, None] * u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Prediction(x, s, x0, process).eps, x + (1 - s[:, None]) * u, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["continuous vp", "edm", "flow", "trigflow"])
def test_velocity_is_the_time_derivative_of_the_path(name: str) -> None:
    """Along fixed (x0, eps), by central differences."""
    process, t = processes()[name]
    t = t[1:-1]
    x0, eps = normal(2, len(t), 3)
    h = 1e-5
    central = (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h)
    velocity = Prediction(process.add_noise(x0, eps, t), t, x0, process).velocity
    assert (velocity - central).norm() < 1e-6 * central.norm()


@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction", "flow_prediction", "score"])
def test_only_edm_and_trigflow_networks_see_a_scaled_state(name: str) -> None:
    for process, t in processes().values():
        assert input_scale(process, t, name) is None


def test_scaled_states_of_data_of_std_sigma_data_have_unit_variance() -> None:
    """Which is what c_in is for; 20,000 samples, five standard errors of a variance."""
    for process, t in processes().values():
        x0, eps = normal(2, 20_000, 1, seed=3)
        for time in t[:: len(t) // 2]:
            x_t = process.add_noise(process.sigma_data * x0, eps, time)
            assert abs((input_scale(process, time, "edm") * x_t).var().item() - 1) < 5 * (2 / 20_000) ** 0.5


def test_same_type_is_not_computed() -> None:
    output, x_t = normal(2, 3, 2)
    assert convert(output, x_t, torch.zeros(3), RectifiedFlow(), "epsilon", "epsilon") is output


def test_v_prediction_at_zero_terminal_snr_is_finite() -> None:
    process, _ = process_from_scheduler(CONFIGS["zero terminal snr"])
    t, (v, x_t) = torch.tensor([999]), normal(2, 1, 4)
    x0 = x0_from_output(v, x_t, t, process, "v_prediction")
    assert torch.equal(x0, -v)
    assert torch.equal(Prediction(x_t, t, x0, process).eps, x_t)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
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
    for function in (x0_from_output, output_from_x0):
        with pytest.raises(ValueError, match="'flow'"):
            function(x, x, t, process, "flow")
    with pytest.raises(ValueError, match="'flow'"):
        convert(x, x, t, process, "epsilon", "flow")
    with pytest.raises(ValueError, match="'flow'"):
        input_scale(process, t, "flow")
