"""Steps that put noise back, against the forward process and each other."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import Prediction, ddim_step, process_from_scheduler
from fastdiff.diffusion.process import EDM, ContinuousVP, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.renoising import consistency_step, renoise, tcd_step

PROCESS, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
PROCESSES = [PROCESS, ContinuousVP(PROCESS.alphas_cumprod), EDM(), RectifiedFlow(), TrigFlow()]
name = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(process: NoiseProcess, *times: int) -> list[torch.Tensor]:
    """Times of ``process`` [4] with the noise-to-signal ratios of those rows of the table."""
    return [process.t_from_nsr(PROCESS.nsr(torch.tensor([t] * 4))) for t in times]


@name
def test_renoised_states_have_the_marginal_of_the_later_time(process: NoiseProcess) -> None:
    """Signal alpha_u and variance s_u^2, also through a time between: the kernels compose."""
    t, w, u = rows(process, 200, 450, 800)
    one, zero = torch.ones_like(noise()), torch.zeros_like(noise())
    a, s = (value(u)[:, None, None].expand_as(one) for value in (process.alpha, process.sigma))
    clean = process.add_noise(one, zero, t)
    torch.testing.assert_close(renoise(clean, t, u, zero, process), a, rtol=1e-12, atol=1e-12)
    old = renoise(process.add_noise(zero, one, t), t, u, zero, process)
    new = renoise(zero, t, u, one, process)
    torch.testing.assert_close(old.square() + new.square(), s.square(), rtol=1e-12, atol=1e-12)
    first = renoise(renoise(zero, t, w, one, process), w, u, zero, process)
    second = renoise(zero, w, u, one, process)
    torch.testing.assert_close(first.square() + second.square(), new.square(), rtol=1e-12, atol=1e-12)
    assert torch.equal(renoise(noise(), t, t, noise(1), process), noise())


@name
def test_renoise_refuses_to_go_down(process: NoiseProcess) -> None:
    t, u = rows(process, 500, 400)
    with pytest.raises(ValueError, match="u is earlier than t"):
        renoise(noise(), t, u, noise(1), process)


@name
def test_consistency_step_is_the_forward_process_of_x0(process: NoiseProcess) -> None:
    t, u = rows(process, 700, 300)
    prediction = Prediction(noise(), t, noise(1), process)
    expected = process.alpha(u)[:, None, None] * noise(1) + process.sigma(u)[:, None, None] * noise(2)
    torch.testing.assert_close(consistency_step(prediction, u, noise(2)), expected, rtol=1e-12, atol=1e-12)
    assert consistency_step(prediction, None, None) is prediction.x0
    ancestral = ddim_step(Prediction(noise(), t, noise(1), process), u, eta=1.0, noise=noise(2))
    assert (consistency_step(prediction, u, noise(2)) - ancestral).norm() > 0.05 * expected.norm()


@name
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_step_by_hand(process: NoiseProcess, gamma: float) -> None:
    t, u = rows(process, 700, 300)
    prediction = Prediction(noise(), t, noise(1), process)
    w = (1 - gamma) * u if u.is_floating_point() else torch.tensor([{0.0: 300, 0.3: 210, 1.0: 0}[gamma]] * 4)
    a_u, a_w, s_u, s_w = (value(time)[:, None, None] for value in (process.alpha, process.sigma) for time in (u, w))
    down = a_w * prediction.x0 + s_w * prediction.eps
    expected = a_u / a_w * down + (s_u**2 - (a_u / a_w * s_w) ** 2).clamp(min=0).sqrt() * noise(2)
    torch.testing.assert_close(tcd_step(prediction, u, noise(2), gamma), expected, rtol=1e-11, atol=1e-11)
    assert tcd_step(prediction, None, None, gamma) is prediction.x0
    if gamma == 0:
        assert torch.equal(tcd_step(prediction, u, noise(2), gamma), ddim_step(prediction, u))
    if gamma == 1 and process.sigma(w)[0] == 0:
        assert torch.allclose(tcd_step(prediction, u, noise(2), gamma), consistency_step(prediction, u, noise(2)), rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 0.8, 0.9, 1.0])
def test_rows_between_are_rounded_as_diffusers_does(gamma: float) -> None:
    """floor((1 - gamma) u) of an integer tensor is float32: in float64 gamma = 0.3 at u = 90 falls on row 62, not 63."""
    u = torch.arange(1000)
    row = torch.floor((1 - gamma) * u).to(torch.long)
    zero = torch.zeros(1000, 1, dtype=torch.float64)
    prediction = Prediction(zero, torch.full((1000,), 999), zero + 1, PROCESS)
    scale = (PROCESS.alpha(u) / PROCESS.alpha(row))[:, None]
    torch.testing.assert_close(tcd_step(prediction, u, zero, gamma), scale * ddim_step(prediction, row), rtol=1e-12, atol=1e-12)


def test_missing_noise_and_impossible_gamma_are_refused() -> None:
    prediction = Prediction(noise(), torch.tensor([700] * 4), noise(1), PROCESS)
    u = torch.tensor([300] * 4)
    for step in (consistency_step, lambda *arguments: tcd_step(*arguments, 0.3)):
        with pytest.raises(ValueError, match="noise is missing"):
            step(prediction, u, None)
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
            tcd_step(prediction, u, noise(), gamma)


def test_samples_of_a_batch_keep_their_own_times() -> None:
    t, u = torch.tensor([[0.9, 0.6, 0.8, 1.0], [0.5, 0.0, 0.7, 0.9]], dtype=torch.float64)
    flow, x, x0, fresh = RectifiedFlow(), *(noise(seed) for seed in range(3))
    steps = [
        lambda i: renoise(x[i], u[i], t[i], fresh[i], flow),
        lambda i: consistency_step(Prediction(x[i], t[i], x0[i], flow), u[i], fresh[i]),
        lambda i: tcd_step(Prediction(x[i], t[i], x0[i], flow), u[i], fresh[i], 0.3),
    ]
    for step in steps:
        assert torch.equal(step(slice(None)), torch.cat([step(slice(i, i + 1)) for i in range(4)]))
