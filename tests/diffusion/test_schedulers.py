"""Whole trajectories against diffusers' schedulers, from their own tables and sigmas, with an exact denoiser as the network.

States are compared after every step, relative to their norm; the schedulers compute in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from tiny import BETAS

from fastdiff.diffusion import DiscreteVP, GaussianMixture, NoiseProcess, Prediction, ddim_step, x0_from_output
from fastdiff.diffusion.process import EDM, RectifiedFlow, TrigFlow
from fastdiff.diffusion.renoising import consistency_step, tcd_step
from fastdiff.diffusion.solvers import dpmpp_2m_step, euler_step, heun_step

N = 32
Step = Callable[[Prediction, torch.Tensor | None], torch.Tensor]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def law(process: NoiseProcess) -> GaussianMixture:
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    variances, weights = torch.tensor([[0.3, 0.5, 0.2], [0.5, 0.2, 0.3]], dtype=torch.float64)
    return GaussianMixture(means, variances, weights, process)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(seed))


def batch(t: torch.Tensor | float) -> torch.Tensor:
    t = torch.as_tensor(t)
    return (t.double() if t.is_floating_point() else t).expand(N)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).norm() < 1e-5 * theirs.norm())


def ours_step(
    x: torch.Tensor, t: torch.Tensor, u: torch.Tensor | None, kind: str, process: NoiseProcess, step: Step
) -> torch.Tensor:
    """One step of ours, through the network's output of that kind and back, in float64."""
    output = law(process)(x, t).output(kind)
    return step(Prediction(x, t, x0_from_output(output, x, t, process, kind), process), u)


@pytest.mark.parametrize("n", [1, 3, 4, 10, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim(kind: str, eta: float, n: int) -> None:
    """Its target time is t - T // n: for n = 3 it steps from 666 to 333 and asks the network at 332, and so do we here."""
    for spacing, one in (("trailing", True), ("leading", False), ("linspace", True)):
        options = {"prediction_type": kind, "clip_sample": False, "set_alpha_to_one": one, "timestep_spacing": spacing}
        scheduler = DDIMScheduler(**BETAS, **options)
        scheduler.set_timesteps(n)
        process = DiscreteVP(scheduler.alphas_cumprod)
        theirs, ours = noise(), noise().double()
        for i, t in enumerate(scheduler.timesteps):
            fresh, earlier = noise(i + 1), int(t) - 1000 // n
            u = batch(torch.tensor(max(earlier, 0))) if earlier >= 0 or not one else None
            output = law(process)(theirs, batch(t)).output(kind)
            theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=fresh).prev_sample
            ours = ours_step(ours, batch(t), u, kind, process, partial(ddim_step, eta=eta, noise=fresh))
            assert close(ours, theirs), (spacing, i)


def exploding(scheduler: EulerDiscreteScheduler | HeunDiscreteScheduler | EulerAncestralDiscreteScheduler, n: int) -> torch.Tensor:
    """Sets the grid; the state to start from."""
    scheduler.set_timesteps(n)
    return noise() * scheduler.init_noise_sigma


def vp_output(x: torch.Tensor, sigma: torch.Tensor, scaled: torch.Tensor, kind: str) -> torch.Tensor:
    """What a network under the variance-preserving process says, which sees x / sqrt(sigma^2 + 1)."""
    torch.testing.assert_close(scaled.double(), x.double() / (sigma.double() ** 2 + 1).sqrt(), rtol=1e-6, atol=1e-6)
    prediction = law(EDM())(x, batch(sigma))
    return prediction.eps if kind == "epsilon" else (prediction.eps - sigma * prediction.x0) / (sigma**2 + 1).sqrt()


@pytest.mark.parametrize("n", [2, 4, 10, 25])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_discrete(kind: str, spacing: str, n: int) -> None:
    """In x / alpha with its own, linearly interpolated sigmas, down to 0: ``EDM``, Euler or DDIM alike."""
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=kind, timestep_spacing=spacing)
    theirs = exploding(scheduler, n)
    ours, straight, edm = theirs.double(), theirs.double(), EDM()
    for i, t in enumerate(scheduler.timesteps):
        sigma, target = scheduler.sigmas[i : i + 2]
        output = vp_output(theirs, sigma, scheduler.scale_model_input(theirs, t), kind)
        theirs = scheduler.step(output, t, theirs).prev_sample
        ours = ddim_step(law(edm)(ours, batch(sigma)), batch(target))
        straight = euler_step(law(edm)(straight, batch(sigma)), batch(target))
        assert close(ours, theirs), i
        assert close(straight, theirs), i


@pytest.mark.parametrize("n", [2, 4, 10])
def test_euler_discrete_is_ddim_of_the_table(n: int) -> None:
    """With trailing times the sigmas are rows: its state is ours over alpha, and its start the same unit noise."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    theirs = exploding(scheduler, n)
    process = DiscreteVP(scheduler.alphas_cumprod)
    ours = theirs.double() * process.alpha(torch.tensor(999))
    times = scheduler.timesteps.long()
    for i, t in enumerate(scheduler.timesteps):
        output = vp_output(theirs, scheduler.sigmas[i], scheduler.scale_model_input(theirs, t), "epsilon")
        theirs = scheduler.step(output, t, theirs).prev_sample
        u = batch(times[i + 1]) if i + 1 < n else None
        ours = ddim_step(law(process)(ours, batch(times[i])), u)
        assert close(ours if u is None else ours / process.alpha(u)[:, None], theirs), i


@pytest.mark.parametrize("n", [2, 4, 10])
def test_heun_discrete(n: int) -> None:
    """Its second half-step asks the network again; at sigma = 0 it has none, and here there is no call."""
    scheduler = HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    theirs = exploding(scheduler, n)
    ours, sigmas = theirs.double(), torch.unique_consecutive(scheduler.sigmas)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(theirs, t)
        output = vp_output(theirs, scheduler.sigmas[scheduler.step_index], scaled, "epsilon")
        theirs = scheduler.step(output, t, theirs).prev_sample
    for sigma, target in zip(sigmas, sigmas[1:], strict=False):
        ours = heun_step(law(EDM()), law(EDM())(ours, batch(sigma)), batch(target))
    assert close(ours, theirs)


@pytest.mark.parametrize("n", [2, 4, 10])
def test_euler_ancestral(n: int) -> None:
    """Ancestral sampling in x / alpha is DDIM with eta = 1 there."""
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    theirs = exploding(scheduler, n)
    ours, draws, again = theirs.double(), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        sigma, target = scheduler.sigmas[i : i + 2]
        output = vp_output(theirs, sigma, scheduler.scale_model_input(theirs, t), "epsilon")
        theirs = scheduler.step(output, t, theirs, generator=draws).prev_sample
        fresh = torch.randn(N, 2, generator=again)
        ours = ddim_step(law(EDM())(ours, batch(sigma)), batch(target), eta=1.0, noise=fresh)
        assert close(ours, theirs), i


@pytest.mark.parametrize("n", [1, 2, 4, 10, 20])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_dpm_solver_multistep(kind: str, order: int, spacing: str, n: int) -> None:
    options = {"algorithm_type": "dpmsolver++", "solver_order": order, "timestep_spacing": spacing, "final_sigmas_type": "zero"}
    scheduler = DPMSolverMultistepScheduler(**BETAS, **options, prediction_type=kind)
    scheduler.set_timesteps(n)
    process = DiscreteVP(scheduler.alphas_cumprod)
    theirs, ours, previous = noise(), noise().double(), None
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(law(process)(theirs, batch(t)).output(kind), t, theirs).prev_sample
        prediction = law(process)(ours, batch(t))
        u = batch(scheduler.timesteps[i + 1]) if i + 1 < n else None
        ours = dpmpp_2m_step(prediction, previous if order == 2 else None, u)
        previous = prediction
        assert close(ours, theirs), i


@pytest.mark.parametrize("n", [2, 4, 10])
def test_dpm_solver_multistep_of_a_flow_and_of_edm(n: int) -> None:
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    edm = EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    for scheduler, process, kind in ((flow, RectifiedFlow(), "flow_prediction"), (edm, EDM(sigma_data=0.5), "edm")):
        scheduler.set_timesteps(n)
        theirs = noise() * scheduler.init_noise_sigma
        ours, previous = theirs.double(), None
        for i, t in enumerate(scheduler.timesteps):
            sigma, target = (batch(value) for value in scheduler.sigmas[i : i + 2])
            theirs = scheduler.step(law(process)(theirs, sigma).output(kind).float(), t, theirs).prev_sample
            prediction = law(process)(ours, sigma)
            ours = dpmpp_2m_step(prediction, previous, target)
            previous = prediction
            assert close(ours, theirs), (kind, i)


@pytest.mark.parametrize("n", [1, 4, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift: float, n: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    process = RectifiedFlow(shift=shift)
    theirs, ours, straight = noise(), noise().double(), noise().double()
    for i, t in enumerate(scheduler.timesteps):
        sigma, target = (batch(value) for value in scheduler.sigmas[i : i + 2])
        torch.testing.assert_close(process.network_time(sigma), batch(t), rtol=1e-6, atol=1e-4)
        theirs = scheduler.step(law(process)(theirs, sigma).velocity, t, theirs).prev_sample
        ours = ours_step(ours, sigma, target, "flow_prediction", process, ddim_step)
        straight = ours_step(straight, sigma, target, "flow_prediction", process, euler_step)
        assert close(ours, theirs), i
        assert close(straight, theirs), i


def test_heun_of_a_flow_is_not_that_of_diffusers() -> None:
    """FlowMatchHeun averages velocities in the flow's time, ours slopes in (x / alpha, r): two methods of one order."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    process, theirs = RectifiedFlow(), noise()
    for t in scheduler.timesteps:
        theirs = scheduler.step(law(process)(theirs, batch(t) / 1000).velocity, t, theirs).prev_sample
    ours, sigmas = noise().double(), torch.unique_consecutive(scheduler.sigmas)
    for sigma, target in zip(sigmas, sigmas[1:], strict=False):
        ours = heun_step(law(process), law(process)(ours, batch(sigma)), batch(target))
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.2


def draws(n: int, seed: int = 7) -> Iterator[torch.Tensor]:
    """The noise that a scheduler draws from a generator of that seed, step by step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield torch.randn(N, 2, generator=generator)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_lcm(kind: str, n: int) -> None:
    """Its c_skip and c_out at ten times t differ from 0 and 1 by less than the tolerance at every time of these grids."""
    scheduler = LCMScheduler(**BETAS, prediction_type=kind)
    scheduler.set_timesteps(n)
    process, generator = DiscreteVP(scheduler.alphas_cumprod), torch.Generator().manual_seed(7)
    theirs, ours = noise(), noise().double()
    for i, (t, fresh) in enumerate(zip(scheduler.timesteps, draws(n), strict=True)):
        output = law(process)(theirs, batch(t)).output(kind)
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
        u = batch(scheduler.timesteps[i + 1]) if i + 1 < n else None
        ours = ours_step(ours, batch(t), u, kind, process, partial(consistency_step, noise=fresh))
        assert close(ours, theirs), i


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_tcd(kind: str, gamma: float, n: int) -> None:
    """It ends at row 0 of the table, so that is our last u."""
    scheduler = TCDScheduler(**BETAS, prediction_type=kind)
    scheduler.set_timesteps(n)
    process, generator = DiscreteVP(scheduler.alphas_cumprod), torch.Generator().manual_seed(7)
    theirs, ours = noise(), noise().double()
    targets = [*scheduler.timesteps[1:], torch.tensor(0)]
    for i, (t, u, fresh) in enumerate(zip(scheduler.timesteps, targets, draws(n), strict=True)):
        output = law(process)(theirs, batch(t)).output(kind)
        theirs = scheduler.step(output, t, theirs, eta=gamma, generator=generator).prev_sample
        ours = ours_step(ours, batch(t), batch(u), kind, process, partial(tcd_step, noise=fresh, gamma=gamma))
        assert close(ours, theirs), i


@pytest.mark.parametrize("n", [1, 2, 4])
def test_scm(n: int) -> None:
    """Network outputs there are sigma_d F; its first time, 1.5708, lies 4e-6 beyond pi / 2."""
    scheduler = SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(n, intermediate_timesteps=1.3 if n == 2 else None)
    process, generator = TrigFlow(sigma_data=0.5), torch.Generator().manual_seed(7)
    theirs = 0.5 * noise()
    ours = theirs.double()
    for i, (t, u, fresh) in enumerate(zip(scheduler.timesteps, scheduler.timesteps[1:], draws(n), strict=False)):
        output = 0.5 * law(process)(theirs, batch(t)).output("trigflow")
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
        ours = ours_step(ours, batch(t), batch(u), "trigflow", process, partial(consistency_step, noise=fresh))
        assert close(ours, theirs), i
