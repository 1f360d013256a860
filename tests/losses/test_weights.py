"""Weights of denoising score matching."""

import math

import pytest
import torch

from fastdiff.losses import (
    convert_weight,
    edm_weight,
    learned_variance,
    learned_weight,
    logit_normal_weight,
    min_snr_weight,
    p2_weight,
    snr,
)

ANGLES = torch.tensor([0.1, 0.7, 1.1, 1.5], dtype=torch.float64)
VP = (ANGLES.cos(), ANGLES.sin())
GENERAL = (torch.tensor([1.0, 0.9, 0.3, 0.05]).double(), torch.tensor([0.02, 0.5, 2.0, 0.9]).double())
NAMES = ("epsilon", "sample", "v_prediction", "flow_prediction")
WRONSKIAN = torch.tensor([1.0, 0.4, 2.0, 0.7], dtype=torch.float64)


def errors(alpha: torch.Tensor, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """Squared errors of two x0 predictions at one x_t in every parametrisation; u = a' x0 + s' eps with a' = -0.3."""
    x_t, x0, other = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d_alpha = torch.full((4,), -0.3).double()
    d_sigma = (WRONSKIAN + sigma * d_alpha) / alpha

    def views(x0: torch.Tensor) -> tuple[torch.Tensor, ...]:
        eps = (x_t - alpha * x0) / sigma
        return eps, x0, alpha * eps - sigma * x0, d_alpha * x0 + d_sigma * eps

    return {name: (a - b).square() for name, a, b in zip(NAMES, views(x0), views(other), strict=True)}


@pytest.mark.parametrize("process", [VP, GENERAL])
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_converted_weight_gives_the_same_loss(process: tuple[torch.Tensor, ...], source: str, target: str) -> None:
    error, weight = errors(*process), torch.tensor([0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    converted = convert_weight(weight, *process, source=source, target=target, wronskian=WRONSKIAN)
    torch.testing.assert_close(converted * error[target], weight * error[source], rtol=1e-10, atol=0)


def test_uniform_weights_seen_from_eps_and_from_v() -> None:
    """Uniform eps is SNR on x0, uniform x0 is 1 / SNR on eps, uniform v (variance preserving) is SNR + 1 on x0."""
    ratio = snr(*VP)
    torch.testing.assert_close(convert_weight(1.0, *VP, source="epsilon", target="sample"), ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(convert_weight(1.0, *VP, source="sample", target="epsilon"), 1 / ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(convert_weight(1.0, *VP, source="v_prediction", target="sample"), ratio + 1, rtol=1e-12, atol=0)


def test_v_and_x0_convert_where_no_signal_is_left() -> None:
    """Zero-terminal-SNR schedules have alpha = 0: through eps the weight would be inf * 0."""
    end = torch.zeros(1), torch.ones(1)
    assert convert_weight(1.0, *end, source="v_prediction", target="sample").item() == 1


def test_a_velocity_weight_needs_to_know_the_speed() -> None:
    with pytest.raises(ValueError, match="wronskian"):
        convert_weight(1.0, *VP, source="sample", target="flow_prediction")
    with pytest.raises(ValueError, match="sample"):
        convert_weight(1.0, *VP, source="x0", target="epsilon")


def test_edm_weight_is_the_papers_and_makes_the_raw_output_uniform() -> None:
    sigma, sd = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64), 0.5
    weight = edm_weight(torch.ones_like(sigma), sigma, sigma_data=sd)
    torch.testing.assert_close(weight, (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-12, atol=0)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    torch.testing.assert_close(weight * c_out.square(), torch.ones_like(sigma), rtol=1e-12, atol=0)


def test_min_snr_of_every_parametrisation_is_one_loss() -> None:
    on_x0 = min_snr_weight(*VP, on="sample")
    ratio = snr(*VP)
    torch.testing.assert_close(on_x0, ratio.clamp(max=5), rtol=1e-12, atol=0)
    torch.testing.assert_close(min_snr_weight(*VP, on="epsilon"), ratio.clamp(max=5) / ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(min_snr_weight(*VP, on="v_prediction"), ratio.clamp(max=5) / (ratio + 1), rtol=1e-12, atol=0)
    for process in (VP, GENERAL):
        base = min_snr_weight(*process, on="sample", gamma=2.0)
        for name in NAMES:
            got = min_snr_weight(*process, on=name, gamma=2.0, wronskian=WRONSKIAN)
            want = convert_weight(base, *process, source="sample", target=name, wronskian=WRONSKIAN)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_min_snr_is_finite_at_pure_noise_and_without_noise() -> None:
    """min(SNR, 5) / SNR is 0 / 0 at the last step of a zero-terminal-SNR schedule: one NaN sample would end the run."""
    a, s = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert min_snr_weight(a, s, on="epsilon").tolist() == [1, 0]
    assert min_snr_weight(a, s, on="sample").tolist() == [0, 5]
    assert min_snr_weight(a, s, on="v_prediction").tolist() == [0, 0]


def test_p2_closed_form() -> None:
    a, s = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    assert p2_weight(a, s, gamma=0.5, k=2.0).item() == pytest.approx((2 + 0.5625) ** -0.5, rel=1e-12)
    assert p2_weight(a, s, gamma=0.0).item() == 1


def test_logit_normal_is_a_density_with_the_right_median_and_zero_ends() -> None:
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    density = logit_normal_weight(t, mean=-0.4, std=0.7)
    assert density.isfinite().all()
    assert density[[0, -1]].tolist() == [0, 0]
    assert torch.trapezoid(density, t).item() == pytest.approx(1, abs=1e-8)
    below = t <= 1 / (1 + math.exp(0.4))
    assert torch.trapezoid(density[below], t[below]).item() == pytest.approx(0.5, abs=1e-4)


def test_learned_variance_is_least_at_the_log_of_the_loss() -> None:
    loss = torch.tensor([0.2, 3.0], dtype=torch.float64)
    lv = loss.log().requires_grad_()
    value = learned_variance(loss, lv)
    torch.testing.assert_close(value, 1 + loss.log(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), lv)
    assert gradient.abs().max() < 1e-12
    assert (learned_variance(loss, lv + 0.1) > value).all()
    assert (learned_variance(loss, lv - 0.1) > value).all()


def test_learned_weight_is_the_other_sign_of_the_learned_variance() -> None:
    loss, w = torch.tensor([0.2, 3.0], dtype=torch.float64), torch.tensor([0.3, -1.0], dtype=torch.float64)
    torch.testing.assert_close(learned_weight(loss, w), w.exp() * loss - w, rtol=1e-12, atol=0)
    assert torch.equal(learned_weight(loss, w), learned_variance(loss, -w))


def test_a_learned_weight_belongs_to_the_sample() -> None:
    """[B] against [B, C, B] would weigh columns."""
    loss, w = torch.ones(2, 3, 2), torch.tensor([0.0, 1.0])
    got = learned_weight(loss, w)
    torch.testing.assert_close(got[0], torch.ones(3, 2))
    torch.testing.assert_close(got[1], torch.full((3, 2), math.e - 1))


def test_numerical_gradient() -> None:
    loss = torch.tensor([0.2, 3.0], dtype=torch.float64, requires_grad=True)
    lv = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(learned_variance, (loss, lv))
    assert torch.autograd.gradcheck(learned_weight, (loss, lv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, s = (x.to(dtype) for x in VP)
    wide = a.float(), s.float()
    for half, full in (
        (snr(a, s), snr(*wide)),
        (edm_weight(a, s, sigma_data=0.5), edm_weight(*wide, sigma_data=0.5)),
        (min_snr_weight(a, s, on="epsilon"), min_snr_weight(*wide, on="epsilon")),
        (p2_weight(a, s), p2_weight(*wide)),
        (logit_normal_weight(s), logit_normal_weight(wide[1])),
        (learned_variance(a, s), learned_variance(*wide)),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)
