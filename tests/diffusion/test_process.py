"""Noise processes: coefficients, derivatives and time maps, and their reading from scheduler configs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from tiny import BETAS

from fastdiff.diffusion.prediction import input_scale, x0_from_output
from fastdiff.diffusion.process import EDM, ContinuousVP, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.schedulers import process_from_scheduler

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "num_train_timesteps": 500}


def stable_diffusion() -> DiscreteVP:
    process, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
    assert isinstance(process, DiscreteVP)
    return process


def real_times() -> dict[str, tuple[NoiseProcess, torch.Tensor]]:
    """Every process whose times are real, with times inside it, off the rows of the table."""
    vp = torch.tensor([0.3, 100.7, 400.25, 998.6], dtype=torch.float64)
    return {
        "continuous vp": (stable_diffusion().continuous(), vp),
        "edm": (EDM(), torch.tensor([0.002, 0.5, 7.0, 80.0]).double()),
        "flow": (RectifiedFlow(), torch.tensor([0.01, 0.3, 0.5, 0.99]).double()),
        "trigflow": (TrigFlow(), torch.tensor([0.01, 0.5, 1.0, 1.56]).double()),
        "trigflow of unit data": (TrigFlow(sigma_data=1.0), torch.tensor([0.01, 0.5, 1.0, 1.56]).double()),
    }


@pytest.mark.parametrize("name", real_times())
def test_derivatives_are_those_of_autograd_and_of_central_differences(name: str) -> None:
    process, t = real_times()[name]
    for value, derivative in ((process.alpha, process.dalpha), (process.sigma, process.dsigma)):
        leaf = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf).sum() + 0 * leaf.sum(), leaf)
        torch.testing.assert_close(derivative(t), slope, rtol=1e-12, atol=1e-12)
        inside = t.clamp(process.t_min + 1e-5, process.t_max - 1e-5)
        central = (value(inside + 1e-5) - value(inside - 1e-5)) / 2e-5
        torch.testing.assert_close(derivative(inside), central, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", real_times())
def test_time_of_a_ratio_is_the_inverse_of_the_ratio_of_a_time(name: str) -> None:
    process, t = real_times()[name]
    torch.testing.assert_close(process.t_from_nsr(process.nsr(t)), t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.nsr(t), process.sigma(t) / process.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.log_snr(t), -process.nsr(t).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.snr(t), process.nsr(t).square().reciprocal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.norm(t).square(), process.alpha(t).square() + process.sigma(t).square(), rtol=1e-12, atol=0)


def test_ends_without_signal_or_noise_are_found() -> None:
    ends = torch.tensor([0.0, torch.inf]).double()
    assert RectifiedFlow().t_from_nsr(ends).tolist() == [0, 1]
    assert TrigFlow().t_from_nsr(ends).tolist() == [0, math.pi / 2]
    assert stable_diffusion().t_from_nsr(ends).tolist() == [0, 999]
    assert stable_diffusion().continuous().t_from_nsr(ends).tolist() == [0, 999]


def test_closed_forms_of_the_flow_and_the_circle() -> None:
    s, t = torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0.2, 0.7, 1.5]).double()
    flow, circle, edm = RectifiedFlow(), TrigFlow(sigma_data=0.5), EDM()
    torch.testing.assert_close(flow.nsr(s), s / (1 - s), rtol=1e-12, atol=0)
    torch.testing.assert_close(circle.nsr(t), 0.5 * t.tan(), rtol=1e-12, atol=0)
    assert torch.equal(edm.nsr(s), s)
    torch.testing.assert_close(edm.network_time(torch.tensor(80.0)), torch.tensor(80.0).double().log() / 4, rtol=1e-12, atol=0)
    assert torch.equal(circle.network_time(t), t)
    assert [p.initial_scale for p in (stable_diffusion(), flow, edm, circle)] == [1, 1, 80, 0.5]
    for process in (stable_diffusion(), flow, edm, circle):
        last = torch.tensor(int(process.t_max) if isinstance(process, DiscreteVP) else process.t_max)
        assert process.sigma(last).item() == pytest.approx(process.initial_scale, rel=3e-3)


@pytest.mark.parametrize("betas", [BETAS, LINEAR, {"beta_schedule": "squaredcos_cap_v2"}])
def test_continuous_view_passes_through_the_rows(betas: dict) -> None:
    process, _ = process_from_scheduler(DDPMScheduler(**betas).config)
    assert isinstance(process, DiscreteVP)
    view, t = process.continuous(), torch.arange(1000)
    assert view.t_max == process.t_max
    for name in ("alpha", "sigma", "dalpha", "dsigma"):
        torch.testing.assert_close(getattr(view, name)(t.double()), getattr(process, name)(t), rtol=1e-12, atol=1e-12)
    assert torch.equal(process.t_from_nsr(process.nsr(t)), t)
    torch.testing.assert_close(view.t_from_nsr(process.nsr(t)), t.double(), rtol=1e-12, atol=1e-9)


def test_log_ratio_is_linear_between_rows_and_its_row_is_the_nearest() -> None:
    process, low = stable_diffusion(), torch.tensor([0, 250, 998])
    view = process.continuous()
    for share in (0.25, 0.75):
        r = process.nsr(low).pow(1 - share) * process.nsr(low + 1).pow(share)
        torch.testing.assert_close(view.nsr(low + share), r, rtol=1e-10, atol=0)
        assert torch.equal(process.t_from_nsr(r), low + round(share))


def test_derivatives_of_a_table_are_its_slopes() -> None:
    """One-sided at a row; the mean of both sides is the central difference of rows, up to their curvature."""
    process, t = stable_diffusion(), torch.tensor([100, 500, 900])
    for value, slope in ((process.alpha, process.dalpha), (process.sigma, process.dsigma)):
        central = (value(t + 1) - value(t - 1)) / 2
        torch.testing.assert_close(slope(t), central, rtol=2e-2, atol=0)
    assert process.dalpha(torch.tensor(999)) < 0 < process.dsigma(torch.tensor(999))


@pytest.mark.parametrize("t", [-0.1, 999.1])
def test_real_time_outside_the_table_is_refused(t: float) -> None:
    view = stable_diffusion().continuous()
    for coefficient in (view.alpha, view.dsigma):
        with pytest.raises(ValueError, match=r"0\.\.999"):
            coefficient(torch.tensor([5.0, t]))


@pytest.mark.parametrize("betas", [BETAS, LINEAR, {"beta_schedule": "squaredcos_cap_v2"}])
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DDPMScheduler,
        PNDMScheduler,
        LCMScheduler,
        TCDScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
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


def test_the_row_without_signal_is_the_time_of_no_signal() -> None:
    """Clamped to the row before it, a one-step student of such a teacher would start where there is still signal."""
    process, _ = process_from_scheduler(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    assert isinstance(process, DiscreteVP)
    t = torch.arange(1000)
    assert torch.equal(process.t_from_nsr(process.nsr(t)), t)
    last = process.nsr(torch.tensor(998))
    assert process.t_from_nsr(torch.stack([1.9 * last, 2.1 * last])).tolist() == [998, 999]
    view = process.continuous()
    assert isinstance(view, ContinuousVP)
    assert view.t_max == 998
    assert torch.equal(view.alpha(t[:-1].double()) > 0, torch.ones(999, dtype=torch.bool))
    for slope in (process.dalpha, process.dsigma):
        assert slope(t[:-1]).isfinite().all()
        with pytest.raises(ValueError, match=r"0\.\.998, came 0\.\.999"):
            slope(t)


@pytest.mark.parametrize("t", [torch.tensor(math.pi / 2, dtype=torch.float64), torch.tensor(math.pi / 2), torch.tensor(1.57080)])
def test_the_end_of_the_circle_has_no_signal_however_it_was_rounded(t: torch.Tensor) -> None:
    """float32's pi/2, and the 1.57080 where SCMScheduler starts, are past the top: tan is negative there and its log NaN."""
    zero_snr = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    r = TrigFlow().nsr(t)
    assert r > 1e7
    assert process_from_scheduler(zero_snr)[0].t_from_nsr(r) == 999
    assert stable_diffusion().t_from_nsr(r) == 999
    assert RectifiedFlow().t_from_nsr(r).item() == pytest.approx(1, abs=1e-6)


def test_a_table_shifted_as_cogvideox_shifts_it_is_read() -> None:
    """CogVideoX multiplies r^2 by snr_shift_scale before rescaling: the betas alone are another process."""
    scheduler = CogVideoXDDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    process, kind = process_from_scheduler(scheduler)
    t = torch.arange(1000)
    assert kind == "v_prediction"
    assert (process.alpha(t).square() - scheduler.alphas_cumprod.double()).abs().max() < 1e-12
    plain, _ = process_from_scheduler(CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=1.0))
    thrice, _ = process_from_scheduler(CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=3.0))
    torch.testing.assert_close(thrice.nsr(t), 3**0.5 * plain.nsr(t), rtol=1e-3, atol=0)  # tables in float32, 1 - abar = 1e-3


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=500), "flow_prediction"),
        (FlowMatchHeunDiscreteScheduler(shift=3.0, num_train_timesteps=500), "flow_prediction"),
        (DPMSolverMultistepScheduler(**FLOW, prediction_type="flow_prediction"), "flow_prediction"),
        (UniPCMultistepScheduler(**FLOW, prediction_type="flow_prediction"), "flow_prediction"),
        (UniPCMultistepScheduler(**FLOW, prediction_type="epsilon"), "epsilon"),
    ],
    ids=["euler", "heun", "dpm solver", "unipc", "noise on a flow path"],
)
def test_flow_schedulers_are_read(scheduler: Any, kind: str) -> None:
    process, prediction_type = process_from_scheduler(scheduler)
    assert isinstance(process, RectifiedFlow)
    assert (process.shift, process.dynamic_shift, prediction_type) == (3.0, None, kind)
    assert process.network_time(torch.tensor(0.7)).item() == pytest.approx(350)


def test_dynamic_shifting_is_read_with_its_sizes() -> None:
    sizes = {"base_shift": 0.4, "max_shift": 1.2, "base_image_seq_len": 128, "max_image_seq_len": 8192}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear", **sizes)
    process, _ = process_from_scheduler(scheduler)
    assert isinstance(process, RectifiedFlow)
    assert process.dynamic_shift == {**sizes, "time_shift_type": "linear"}
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
    process, _ = process_from_scheduler(unipc)
    assert isinstance(process, RectifiedFlow)
    assert process.dynamic_shift == {"time_shift_type": "exponential"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_schedulers_are_read_with_the_sign_of_their_output(scheduler: Any, kind: str) -> None:
    """diffusers calls F epsilon and -F v_prediction: read as the one it is not, x0 would be reflected about c_skip x."""
    theirs = scheduler(sigma_min=0.01, sigma_max=60.0, sigma_data=0.7, prediction_type=kind)
    process, prediction_type = process_from_scheduler(theirs)
    assert (process.t_min, process.t_max, process.sigma_data) == (0.01, 60.0, 0.7)
    x_t, output = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma in torch.tensor([0.01, 0.5, 7.0, 60.0]).double():
        x0 = x0_from_output(output, x_t, sigma, process, prediction_type)
        torch.testing.assert_close(x0, theirs.precondition_outputs(x_t, output, sigma), rtol=1e-12, atol=1e-12)
        scaled = input_scale(process, sigma, prediction_type) * x_t
        torch.testing.assert_close(scaled, theirs.precondition_inputs(x_t, sigma), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(process.network_time(sigma), theirs.precondition_noise(sigma), rtol=1e-12, atol=0)


def test_euler_with_continuous_times_is_edm_of_unit_data() -> None:
    """Stable Video Diffusion: read by its betas alone, the network would get 0..999 where it was trained on ln(sigma) / 4."""
    ends = {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, "timestep_spacing": "leading"}
    scheduler = EulerDiscreteScheduler(**BETAS, **ends, timestep_type="continuous", prediction_type="v_prediction")
    process, kind = process_from_scheduler(scheduler)
    scheduler.set_timesteps(5)
    assert kind == "trigflow"
    assert (process.t_min, process.t_max, process.sigma_data) == (0.002, 700.0, 1.0)
    assert process.nsr(scheduler.sigmas[0]) == pytest.approx(700)
    x_t = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    for sigma, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        scaled = scheduler.scale_model_input(x_t, time)
        torch.testing.assert_close(input_scale(process, sigma, kind).float() * x_t, scaled)
        torch.testing.assert_close(process.network_time(sigma).float(), time)
        step = scheduler.step(scaled.sin(), time, x_t)
        torch.testing.assert_close(x0_from_output(scaled.sin(), x_t, sigma, process, kind), step.pred_original_sample)
        x_t = step.prev_sample
    bare = EulerDiscreteScheduler(**BETAS, timestep_type="continuous", prediction_type="v_prediction")
    process, _ = process_from_scheduler(bare)
    assert process.t_max == pytest.approx(14.61, abs=5e-3)


def test_scm_is_trigflow() -> None:
    process, kind = process_from_scheduler(SCMScheduler(sigma_data=0.7))
    assert isinstance(process, TrigFlow)
    assert (process.sigma_data, kind) == (0.7, "trigflow")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas.*minus the velocity"),
        (DPMSolverMultistepScheduler(**FLOW, prediction_type="v_prediction"), "'v_prediction' is no process known"),
        (EDMDPMSolverMultistepScheduler(prediction_type="sample"), "EDMDPM.* 'sample' is no process known"),
        (SCMScheduler(prediction_type="epsilon"), "SCMScheduler .*no process known"),
        (CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler .*no process known"),
        (HeunDiscreteScheduler(beta_schedule="exp"), "'exp' is not known.*trained_betas"),
        (FlowMatchEulerDiscreteScheduler().config, "of no class.*pass the scheduler itself"),
        ({}, "of no class.*no process known"),
    ],
    ids=["inverted flow", "v on a flow path", "edm sample", "scm of another type", "cm", "exp", "unnamed", "nothing"],
)
def test_what_would_be_read_as_another_process_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_from_scheduler(scheduler)


def test_a_saved_config_is_read_as_its_scheduler(tmp_path: Path) -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), EDMEulerScheduler(sigma_max=60.0), SCMScheduler()):
        scheduler.save_pretrained(tmp_path)
        ours, again = process_from_scheduler(scheduler), process_from_scheduler(type(scheduler).load_config(tmp_path))
        assert type(ours[0]) is type(again[0])
        assert vars(ours[0]) == vars(again[0])
        assert ours[1] == again[1]


def test_flow_path_and_noise_are_those_of_diffusers() -> None:
    """The scheduler's own x_t and its x0 of a velocity, at its own times."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    process, kind = process_from_scheduler(scheduler)
    scheduler.set_timesteps(6)
    x0, eps, output = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0))
    for i, s in enumerate(scheduler.sigmas[:-1]):
        scheduler._step_index = i
        x_t = process.add_noise(x0, eps, s)
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(s)
        torch.testing.assert_close(x_t, alpha * x0 + sigma * eps)
        torch.testing.assert_close(
            x0_from_output(output, x_t, s, process, kind), scheduler.convert_model_output(output, sample=x_t)
        )
        torch.testing.assert_close(process.network_time(s).long(), scheduler.timesteps[i])


def test_trigflow_step_is_that_of_diffusers() -> None:
    """SCMScheduler takes sigma_data F, as SanaSprintPipeline hands it over."""
    scheduler = SCMScheduler()
    process, kind = process_from_scheduler(scheduler)
    scheduler.set_timesteps(2)
    x_t, output = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[:2]:
        theirs = scheduler.step(process.sigma_data * output, t, x_t, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(x0_from_output(output, x_t, t, process, kind), theirs.pred_original_sample)
        torch.testing.assert_close(input_scale(process, t, kind), torch.tensor(1 / process.sigma_data).double())


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
