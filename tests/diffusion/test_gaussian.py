"""The single Gaussian's flow maps against numerical integration, their group law and their push-forward."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.process import EDM, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.reference import reference_flow_map
from fastdiff.diffusion.schedulers import process_from_scheduler

VP, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
assert isinstance(VP, DiscreteVP)
PROCESSES: dict[str, NoiseProcess] = {
    "discrete vp": VP,
    "continuous vp": VP.continuous(),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "trigflow": TrigFlow(sigma_data=0.7),
}
TIMES = {  # late, middle, early
    "discrete vp": [999, 400, 30],
    "continuous vp": [999.0, 400.5, 30.25],
    "edm": [80.0, 1.3, 0.05],
    "flow": [1.0, 0.6, 0.05],
    "trigflow": [math.pi / 2, 0.8, 0.03],
}
EVERY = pytest.mark.parametrize("name", PROCESSES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def law_and_times(name: str) -> tuple[Gaussian, list[torch.Tensor]]:
    dtype = torch.int64 if name == "discrete vp" else torch.float64
    return Gaussian.anisotropic(PROCESSES[name], d=5), [torch.tensor(t, dtype=dtype) for t in TIMES[name]]


def marginal(law: Gaussian, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of x_t."""
    mean, covariance = law.moments()
    a, s = law.process.alpha(t), law.process.sigma(t)
    return a * mean, a**2 * covariance + s**2 * torch.eye(len(mean)).double()


@EVERY
def test_flow_map_is_the_integrated_ode(name: str) -> None:
    law, (late, middle, early) = law_and_times(name)
    mean, covariance = marginal(law, late)
    x = mean + normal(4, 5) @ torch.linalg.cholesky(covariance).T
    for t, u in [(late, middle), (middle, early), (late, None), (early, middle)]:
        assert (law.flow_map(x, t, u) - reference_flow_map(law, x, t, u)).abs().max() < 1e-7


@EVERY
def test_flow_maps_compose(name: str) -> None:
    law, (late, middle, early) = law_and_times(name)
    x = normal(4, 5)
    for u in (early, None):
        torch.testing.assert_close(
            law.flow_map(law.flow_map(x, late, middle), middle, u), law.flow_map(x, late, u), rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(law.flow_map(law.flow_map(x, late, early), early, late), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(law.consistency(x, late), law.flow_map(x, late, None))


@EVERY
def test_flow_map_carries_marginal_to_marginal(name: str) -> None:
    """It is affine, x -> c + J x: c + J mean_t and J V_t J^T are the mean and covariance at u."""
    law, (late, middle, _) = law_and_times(name)
    jacobian = torch.func.jacrev(lambda x: law.flow_map(x[None], late, middle)[0])(normal(5))
    mean, covariance = marginal(law, late)
    wanted_mean, wanted_covariance = marginal(law, middle)
    torch.testing.assert_close(law.flow_map(mean[None], late, middle)[0], wanted_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian @ covariance @ jacobian.T, wanted_covariance, rtol=1e-11, atol=1e-12)
    data = torch.func.jacrev(lambda x: law.consistency(x[None], late)[0])(normal(5))
    torch.testing.assert_close(data @ covariance @ data.T, law.moments()[1], rtol=1e-11, atol=1e-12)


@EVERY
def test_velocity_is_that_of_the_prediction_and_of_the_flow_map(name: str) -> None:
    law, (_, middle, early) = law_and_times(name)
    for t in (middle, early):
        x, per_sample = normal(4, 5), t.expand(4)
        scale = law.velocity(x, t).abs().max()
        assert (law(x, per_sample).velocity - law.velocity(x, t)).abs().max() < 1e-11 * scale
        if name != "discrete vp":
            step = 1e-4 * float(t)
            central = (law.flow_map(x, t, t + step) - law.flow_map(x, t, t - step)) / (2 * step)
            assert (central - law.velocity(x, t)).abs().max() < 1e-5 * scale


@EVERY
def test_mean_velocity_leads_from_t_to_u_and_tends_to_the_velocity(name: str) -> None:
    law, (_, middle, early) = law_and_times(name)
    x = normal(4, 5)
    t, u = middle.expand(4), torch.stack([early, middle, early, early])
    mean = law.mean_velocity(x, t, u)
    arrived = x - (t.double() - u.double())[:, None] * mean
    torch.testing.assert_close(arrived, law.flow_map(x, t, u), rtol=1e-12, atol=1e-12)
    assert torch.equal(mean[1], law.velocity(x, t)[1])  # u = t in one sample of the batch
    if name == "discrete vp":
        return
    gaps = [(law.mean_velocity(x, middle, middle * (1 - h)) - law.velocity(x, middle)).abs().max() for h in (1e-3, 5e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.01)  # first order in t - u


def test_velocity_is_finite_on_the_data_where_the_prediction_divides_by_zero() -> None:
    law, x, zero = Gaussian.anisotropic(RectifiedFlow(), d=3), normal(2, 3), torch.zeros(2).double()
    assert not law(x, zero).velocity.isfinite().any()
    assert (law.velocity(x, zero) + x).abs().max() < 1e-14  # d/dt (1 - t) x0 + t eps, and E[eps | x0] = 0


def test_data_is_carried_into_noise_too() -> None:
    law, x, u = Gaussian.anisotropic(RectifiedFlow(), d=3), normal(2, 3), torch.tensor(1.0)
    noise = law.flow_map(x, torch.tensor(0.0), u)
    assert (reference_flow_map(law, x, torch.tensor(0.0), u) - noise).abs().max() < 1e-7
    assert (law.consistency(noise, u) - x).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["continuous vp", "edm", "flow", "trigflow"])
def test_consistency_is_constant_along_trajectories_and_mean_velocity_keeps_its_identity(name: str) -> None:
    """Forward-mode derivatives along (dx/dt, 1): df = 0 (sCM) and w = dx/dt - (t - u) dw (MeanFlow)."""
    law, (_, t, u) = law_and_times(name)
    x = normal(4, 5)
    velocity = law.velocity(x, t)
    _, df = torch.func.jvp(law.consistency, (x, t), (velocity, torch.ones_like(t)))
    assert df.abs().max() < 1e-12
    w, dw = torch.func.jvp(lambda x, t: law.mean_velocity(x, t, u), (x, t), (velocity, torch.ones_like(t)))
    torch.testing.assert_close(w, velocity - (t - u) * dw, rtol=1e-11, atol=1e-11)


def test_mean_velocity_averages_the_velocity_along_the_trajectory() -> None:
    """By Simpson's rule on 2,000 intervals."""
    law, x = Gaussian.anisotropic(RectifiedFlow(), d=3), normal(1, 3)
    times = torch.linspace(0.2, 0.9, 2001, dtype=torch.float64)
    velocities = law.velocity(law.flow_map(x.expand(2001, 3), times[-1], times), times)
    weights = torch.tensor([1.0, *[4.0, 2.0] * 999, 4.0, 1.0], dtype=torch.float64) / 6000
    torch.testing.assert_close(law.mean_velocity(x, times[-1], times[0])[0], weights @ velocities, rtol=1e-9, atol=1e-9)


def test_anisotropic_has_the_moments_that_it_says() -> None:
    law = Gaussian.anisotropic(EDM(), d=16)
    mean, covariance = law.moments()
    values = torch.linalg.eigvalsh(covariance)
    assert (values[-1] / values[0]).item() == pytest.approx(30, rel=1e-9)
    assert covariance.diagonal().mean().item() == pytest.approx(1, rel=1e-12)
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.1
    assert mean.norm() > 1


def test_image_shaped_gaussians_flow_in_their_shape_and_dtype() -> None:
    flat = Gaussian.anisotropic(TrigFlow(), d=12)
    image = Gaussian(flat.means.reshape(3, 2, 2), flat.moments()[1], flat.process)
    x, t, u = normal(4, 3, 2, 2), torch.tensor([1.5, 1.0, 0.7, 0.3]), torch.tensor([0.9, 0.4, 0.1, 0.2])
    assert image.sample(2, torch.Generator()).shape == (2, 3, 2, 2)
    for got, want in [
        (image.flow_map(x, t, u), flat.flow_map(x.flatten(1), t, u)),
        (image.mean_velocity(x, t, u), flat.mean_velocity(x.flatten(1), t, u)),
        (image(x, t).x0, flat(x.flatten(1), t).x0),
    ]:
        torch.testing.assert_close(got.flatten(1), want, rtol=1e-10, atol=1e-10)
    single = image.flow_map(x.float(), t, u)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), image.flow_map(x, t, u), rtol=1e-5, atol=1e-5)
