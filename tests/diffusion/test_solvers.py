"""Steps of the probability-flow ODE against diffusers, closed forms and each other."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
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
from fastdiff.diffusion.process import EDM, ContinuousVP, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.solvers import (
    dpmpp_2m_sample,
    dpmpp_2m_step,
    euler_step,
    heun_step,
    lcm_times,
    leading_times,
    linspace_times,
    sample,
)

PROCESS, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
PROCESSES = [
    PROCESS,
    ContinuousVP(PROCESS.alphas_cumprod),
    EDM(sigma_data=1.2),
    RectifiedFlow(),
    TrigFlow(sigma_data=1.0),
    TrigFlow(sigma_data=0.5),
]
name = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{type(p).__name__}-{p.sigma_data}")


def blobs(process: NoiseProcess) -> GaussianMixture:
    """Three overlapping Gaussians of unequal width: a denoiser that is exact and far from linear."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    variances, weights = torch.tensor([[0.3, 0.5, 0.2], [0.5, 0.2, 0.3]], dtype=torch.float64)
    return GaussianMixture(means, variances, weights, process)


def noise(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(process: NoiseProcess, *times: int) -> list[torch.Tensor]:
    """Times of ``process`` [6] with the noise-to-signal ratios of those rows of the table."""
    return [process.t_from_nsr(PROCESS.nsr(torch.tensor([t] * 6))) for t in times]


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


@name
def test_a_step_depends_on_the_process_only_through_the_ratio(process: NoiseProcess) -> None:
    """Every process is EDM in x / alpha with sigma = r; a coefficient of the wrong process would pass its own tests."""
    law, vp = blobs(process), blobs(edm := EDM())
    last, t, u = rows(process, 900, 700, 450)
    r_last, r_t, r_u = (process.nsr(time) for time in (last, t, u))
    assert torch.allclose(r_t, PROCESS.nsr(torch.tensor(700)), rtol=1e-12)
    y = 4 * noise()

    def there(y: torch.Tensor, time: torch.Tensor) -> Prediction:
        return law(process.alpha(time)[:, None] * y, time)

    def back(x: torch.Tensor) -> torch.Tensor:
        return x / process.alpha(u)[:, None]

    torch.testing.assert_close(there(y, t).x0, vp(y, r_t).x0, rtol=1e-12, atol=1e-12)
    for ours, theirs in (
        (ddim_step(there(y, t), u), ddim_step(vp(y, r_t), r_u)),
        (ddim_step(there(y, t), u, eta=0.6, noise=noise()), ddim_step(vp(y, r_t), r_u, eta=0.6, noise=noise())),
        (heun_step(law, there(y, t), u), heun_step(vp, vp(y, r_t), r_u)),
        (dpmpp_2m_step(there(y, t), there(2 * y, last), u), dpmpp_2m_step(vp(y, r_t), vp(2 * y, r_last), r_u)),
    ):
        torch.testing.assert_close(back(ours), theirs, rtol=1e-11, atol=1e-11)
    assert edm.nsr(r_u).equal(r_u)


def test_heun_is_that_of_edm() -> None:
    law, (t, u), x = blobs(EDM()), (torch.tensor([9.0, 1.0]).double(), torch.tensor([4.0, 0.3]).double()), noise(2) * 5
    d = (x - law(x, t).x0) / t[:, None]
    trial = x + (u - t)[:, None] * d
    d_trial = (trial - law(trial, u).x0) / u[:, None]
    torch.testing.assert_close(heun_step(law, law(x, t), u), x + (u - t)[:, None] * (d + d_trial) / 2, rtol=1e-12, atol=1e-12)


@name
def test_2m_is_the_formula_of_the_paper(process: NoiseProcess) -> None:
    law, x = blobs(process), noise() * 2
    last, t, u = rows(process, 800, 650, 300)
    now, before = law(x, t), law(x + 1, last)
    h, h_last = process.log_snr(u) - process.log_snr(t), process.log_snr(t) - process.log_snr(last)
    share = (h / (2 * h_last))[:, None]
    mean = (1 + share) * now.x0 - share * before.x0
    expected = (process.sigma(u) / process.sigma(t))[:, None] * x - (process.alpha(u) * torch.expm1(-h))[:, None] * mean
    torch.testing.assert_close(dpmpp_2m_step(now, before, u), expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(dpmpp_2m_step(now, None, u), ddim_step(now, u))


def test_2m_on_trigflow_is_its_closed_form() -> None:
    """DDIM + sin(t - u) / (2 R sin t) (D_t - D_last), R = [ln tan last - ln tan t] / [ln tan t - ln tan u]."""
    process, x = TrigFlow(sigma_data=0.5), noise()
    last, t, u = (torch.full((6,), time, dtype=torch.float64) for time in (1.4, 1.1, 0.6))
    now, before = blobs(process)(x, t), blobs(process)(x + 1, last)
    ratio = (last.tan().log() - t.tan().log()) / (t.tan().log() - u.tan().log())
    expected = ddim_step(now, u) + ((t - u).sin() / (2 * ratio * t.sin()))[:, None] * (now.x0 - before.x0)
    torch.testing.assert_close(dpmpp_2m_step(now, before, u), expected, rtol=1e-12, atol=1e-12)
    arc = (t - u).cos()[:, None] * x - (t - u).sin()[:, None] * 0.5 * now.trigflow
    torch.testing.assert_close(ddim_step(now, u), arc, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", [RectifiedFlow(), EDM()])
def test_euler_is_ddim_where_paths_are_straight(process: NoiseProcess) -> None:
    prediction = blobs(process)(noise(), torch.full((6,), 0.8, dtype=torch.float64))
    for u in (torch.full((6,), 0.3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), None):
        torch.testing.assert_close(euler_step(prediction, u), ddim_step(prediction, u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", [PROCESSES[1], TrigFlow(sigma_data=0.5)])
def test_euler_is_not_ddim_where_they_are_not_but_agrees_to_first_order(process: NoiseProcess) -> None:
    t = process.t_from_nsr(torch.full((6,), 2.0, dtype=torch.float64))
    prediction = blobs(process)(noise(), t)
    earlier = [t - share * process.t_max for share in (0.04, 0.02, 0.01)]
    gaps = [(euler_step(prediction, u) - ddim_step(prediction, u)).norm().item() for u in earlier]
    assert gaps[-1] > 1e-5
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in zip(gaps, gaps[1:], strict=False))


@pytest.mark.parametrize("process", PROCESSES[1:-1], ids=lambda p: type(p).__name__)
def test_orders_of_convergence(process: NoiseProcess) -> None:
    """On a curved exact field, by halving equal steps of log r: Euler and DDIM first order, Heun and 2M second."""
    law, z = blobs(process), noise()

    def solve(kind: str, n: int) -> torch.Tensor:
        r = torch.logspace(1.0, -1.0, n + 1, dtype=torch.float64)
        grid = [t.expand(6) for t in process.t_from_nsr(r)]
        x, previous = 3 * process.norm(grid[0])[:, None] * z, None
        for t, u in zip(grid, grid[1:], strict=False):
            prediction = law(x, t)
            if kind == "heun":
                x = heun_step(law, prediction, u)
            elif kind == "2m":
                x = dpmpp_2m_step(prediction, previous, u)
            else:
                x = {"ddim": ddim_step, "euler": euler_step}[kind](prediction, u)
            previous = prediction
        return x

    reference = solve("heun", 400)
    for kind, order in (("euler", 2), ("ddim", 2), ("heun", 4), ("2m", 4)):
        errors = [(solve(kind, n) - reference).norm().item() for n in (20, 40, 80)]
        ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
        assert all(0.8 * order < ratio < 1.25 * order for ratio in ratios), (kind, errors, ratios)
        assert abs(ratios[-1] - order) < 0.12 * order, (kind, errors, ratios)


@pytest.mark.parametrize("process", [RectifiedFlow(), TrigFlow(sigma_data=1.0)])
def test_second_order_steps_start_from_pure_noise(process: NoiseProcess) -> None:
    """alpha = 0 there (6e-17 on the circle): r is infinite, and Heun's trapezoid over it would be infinity times rounding."""
    law, z = blobs(process), noise(200)
    t, u, v = (torch.full((200,), share * process.t_max, dtype=torch.float64) for share in (1.0, 0.8, 0.6))
    first = law(z, t)
    assert torch.equal(heun_step(law, first, u), ddim_step(first, u))
    second = law(ddim_step(first, u), u)
    step = dpmpp_2m_step(second, first, v)
    assert (step - ddim_step(second, v)).norm() < 0.1 * step.norm()
    times = [process.t_max * share for share in torch.linspace(1, 0.02, 16, dtype=torch.float64).tolist()]
    fine = [process.t_max * share for share in torch.linspace(1, 0.002, 400, dtype=torch.float64).tolist()]
    exact = ddim_sample(law, z, fine)
    first_order = (ddim_sample(law, z, times) - exact).norm()
    assert (sample(law, z, times, partial(heun_step, law)) - exact).norm() < 0.7 * first_order
    assert (dpmpp_2m_sample(law, z, times) - exact).norm() < 0.7 * first_order


@pytest.mark.parametrize("process", [RectifiedFlow(), EDM(), TrigFlow()])
def test_last_step_is_first_order_and_costs_no_call(process: NoiseProcess) -> None:
    law, calls = blobs(process), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        calls.append(t)
        return law(x, t)

    last, t, end = (torch.full((6,), time, dtype=torch.float64) for time in (0.7, 0.4, 0.0))
    before, now = law(noise(), last), law(noise(), t)
    for u in (end, None):
        for x in (heun_step(denoise, now, u), dpmpp_2m_step(now, before, u), ddim_step(now, u)):
            torch.testing.assert_close(x, now.x0, rtol=1e-12, atol=1e-12)
    assert not calls
    sample(denoise, process.initial_scale * noise(), [0.7, 0.4, 0.1], partial(heun_step, denoise))
    assert [t[0].item() for t in calls] == [0.7, 0.4, 0.4, 0.1, 0.1]
    assert calls[0].dtype == torch.float64
    x, grid = process.initial_scale * noise(), [0.7, 0.4, 0.1]
    assert torch.equal(ddim_sample(law, x, grid), ddim_sample(law, x, torch.tensor(grid, dtype=torch.float64)))


@name
def test_eta_one_is_the_posterior_of_the_forward_process(process: NoiseProcess) -> None:
    """q(x_u | x_t, x0) from Bayes' rule on the forward kernel; and for every eta the variances add up to s_u^2."""
    t, u = rows(process, 700, 300)
    x_t, x0, fresh = (noise(6, seed) for seed in range(3))
    step = ddim_step(Prediction(x_t, t, x0, process), u, eta=1.0, noise=fresh)
    k = (process.alpha(t) / process.alpha(u))[:, None]
    prior = process.sigma(u).square()[:, None]
    kernel = process.sigma(t).square()[:, None] - k**2 * prior
    variance = 1 / (1 / prior + k**2 / kernel)
    mean = variance * (process.alpha(u)[:, None] * x0 / prior + k * x_t / kernel)
    torch.testing.assert_close(step, mean + variance.sqrt() * fresh, rtol=1e-11, atol=1e-11)
    for eta in (0.0, 0.3, 1.0):
        eps = Prediction(process.sigma(t)[:, None] * torch.ones_like(x0), t, torch.zeros_like(x0), process)
        kept = ddim_step(eps, u, eta=eta, noise=torch.zeros_like(x0))
        added = ddim_step(Prediction(0 * x0, t, 0 * x0, process), u, eta=eta, noise=torch.ones_like(x0))
        torch.testing.assert_close(kept.square() + added.square(), prior.expand(6, 2), rtol=1e-12, atol=1e-12)


def test_eta_keeps_the_noise_of_the_first_row_and_none_at_the_end() -> None:
    """diffusers with set_alpha_to_one=False draws at the last step too: that is u = 0, and u = None draws nothing."""
    prediction = Prediction(noise(), torch.tensor([20] * 6), noise(6, 1), PROCESS)
    assert ddim_step(prediction, None, eta=1.0, noise=noise(6, 2)) is prediction.x0
    u = torch.zeros(6, dtype=torch.int64)
    drawn = ddim_step(prediction, u, eta=1.0, noise=noise(6, 2)) - ddim_step(prediction, u, eta=1.0, noise=0 * noise())
    abar_t, abar_u = PROCESS.alphas_cumprod[20], PROCESS.alphas_cumprod[0]
    variance = (1 - abar_u) / (1 - abar_t) * (1 - abar_t / abar_u)
    torch.testing.assert_close(drawn, variance.sqrt() * noise(6, 2), rtol=1e-10, atol=1e-12)


def test_noise_is_asked_for_and_never_drawn() -> None:
    prediction = Prediction(noise(), torch.tensor([20] * 6), noise(6, 1), PROCESS)
    with pytest.raises(ValueError, match="pass noise="):
        ddim_step(prediction, torch.tensor([0] * 6), eta=0.5)
    with pytest.raises(ValueError, match="u is later than t"):
        ddim_step(prediction, torch.tensor([30] * 6), eta=0.5, noise=noise())


def test_samples_of_a_batch_keep_their_own_times() -> None:
    """One sample's step may not depend on another's times: per-sample coefficients, not the first one's."""
    law, x = blobs(flow := RectifiedFlow()), noise(3)
    last, t, u = torch.tensor([[0.9, 0.8, 1.0], [0.7, 0.5, 0.9], [0.2, 0.0, 0.8]], dtype=torch.float64)
    steps = [
        lambda i: ddim_step(law(x[i], t[i]), u[i], eta=0.5, noise=x[i]),
        lambda i: euler_step(law(x[i], t[i]), u[i]),
        lambda i: heun_step(law, law(x[i], t[i]), u[i]),
        lambda i: dpmpp_2m_step(law(x[i], t[i]), law(x[i], last[i]), u[i]),
    ]
    for step in steps:
        alone = torch.cat([step(slice(i, i + 1)) for i in range(3)])
        torch.testing.assert_close(step(slice(None)), alone, rtol=1e-13, atol=1e-13)
    assert flow.sigma(u)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_keep_their_dtype_and_coefficients_their_precision(dtype: torch.dtype) -> None:
    law, x = blobs(flow := RectifiedFlow()), noise().to(dtype)
    t, u = (torch.full((6,), time, dtype=torch.float64) for time in (0.7, 0.4))
    prediction, exact = Prediction(x, t, x * 0.5, flow), Prediction(x.double(), t, x.double() * 0.5, flow)
    for step in (ddim_step, euler_step, partial(dpmpp_2m_step, previous=None)):
        ours = step(prediction, u=u)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), step(exact, u=u), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    assert law(x, t).x0.dtype == dtype


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 25, 50, 61])
def test_grids_are_those_of_diffusers(n: int) -> None:
    for offset in (0, 1):
        scheduler = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=offset)
        scheduler.set_timesteps(n)
        assert leading_times(1000, n, steps_offset=offset) == scheduler.timesteps.tolist()
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="linspace")
    scheduler.set_timesteps(n)
    assert linspace_times(1000, n) == scheduler.timesteps.tolist()
    for spacing, grid in (("leading", leading_times(1000, n + 1)), ("linspace", linspace_times(1000, n + 1))):
        solver = DPMSolverMultistepScheduler(**BETAS, timestep_spacing=spacing)
        solver.set_timesteps(n)
        assert grid[:-1] == solver.timesteps.tolist()


@pytest.mark.parametrize("original", [4, 50, 64, 1000])
def test_lcm_grid_is_that_of_diffusers(original: int) -> None:
    for n in {1, 2, 3, 4, 8, 13, original}:
        if n > original:
            with pytest.raises(ValueError, match="repeat or skip"):
                lcm_times(n, original)
            continue
        for scheduler in (LCMScheduler(**BETAS), TCDScheduler(**BETAS, original_inference_steps=original)):
            if isinstance(scheduler, LCMScheduler):
                scheduler.set_timesteps(n, original_inference_steps=original)
            else:
                scheduler.set_timesteps(n)
            assert lcm_times(n, original) == scheduler.timesteps.tolist()
    assert lcm_times(4) == [999, 759, 499, 259]
