"""A denoiser of one process under another."""

from itertools import permutations
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.guidance import guide
from fastdiff.diffusion.matching import SNRMatched, match_state, snap_time
from fastdiff.diffusion.prediction import PREDICTION_TYPES, Prediction, x0_from_output
from fastdiff.diffusion.process import EDM, DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.diffusion.schedulers import process_from_scheduler

ROWS = torch.tensor([0, 20, 300, 700, 999])


def stable_diffusion() -> DiscreteVP:
    process, _ = process_from_scheduler(DDIMScheduler(**BETAS))
    assert isinstance(process, DiscreteVP)
    return process


PROCESSES: dict[str, NoiseProcess] = {
    "discrete vp": stable_diffusion(),
    "continuous vp": stable_diffusion().continuous(),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "trigflow": TrigFlow(),
    "trigflow of unit data": TrigFlow(sigma_data=1.0),
}
PAIRS = list(permutations(PROCESSES, 2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(process: NoiseProcess) -> GaussianMixture:
    variances, weights = torch.tensor([0.04, 0.3, 1.0, 0.1]).double(), torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    return GaussianMixture(normal(4, 3, seed=1), variances, weights, process, labels=torch.tensor([0, 1, 0, 1]))


def states(process: NoiseProcess) -> tuple[torch.Tensor, torch.Tensor]:
    """States made of data and noise, at the times of the process that have the ratios of ROWS."""
    t = process.t_from_nsr(stable_diffusion().nsr(ROWS))
    return process.add_noise(normal(5, 3), normal(5, 3, seed=2), t), t


class Network:
    """A denoiser of no particular meaning: smooth in the state, and different at every time."""

    def __init__(self, process: NoiseProcess, prediction_type: str) -> None:
        self.process, self.prediction_type = process, prediction_type

    def output(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(1.3 * x.roll(1, dims=-1) - x + expand(t, x))

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> Prediction:
        return Prediction(x, t, x0_from_output(self.output(x, t), x, t, self.process, self.prediction_type), self.process)


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_exact_law_of_one_process_is_that_of_the_other(inner: str, outer: str) -> None:
    there, here = PROCESSES[inner], PROCESSES[outer]
    (x_t, t), cond = states(here), torch.tensor([0, 1, 1, 0, 1])
    matched, direct = SNRMatched(mixture(there), here), mixture(here)
    for labels in (None, cond):
        torch.testing.assert_close(matched(x_t, t, labels).x0, direct(x_t, t, labels).x0, rtol=1e-10, atol=1e-10)
    ours, theirs = matched(x_t, t), direct(x_t, t)
    for name in PREDICTION_TYPES:
        torch.testing.assert_close(ours.output(name), theirs.output(name), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_matched_state_is_made_of_the_same_sample_and_noise(source: str, target: str) -> None:
    x0, eps, here, there = normal(5, 3), normal(5, 3, seed=2), PROCESSES[source], PROCESSES[target]
    _, t = states(here)
    x, u = match_state(here.add_noise(x0, eps, t), t, here, there)
    torch.testing.assert_close(x, there.add_noise(x0, eps, u), rtol=1e-10, atol=1e-10)
    back, again = match_state(x, u, there, here)
    torch.testing.assert_close(back, here.add_noise(x0, eps, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, t, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_flow_under_trigflow_is_sana_sprints_formula(sd: float) -> None:
    """``F = [(1 - 2s) xF + (1 - 2s + 2s^2) u(xF, s)] / q`` with ``xF = q x / sd``; SANA's TrigFlow data is sd times the flow's."""
    flow = Network(RectifiedFlow(), "flow_prediction")
    t, x = torch.tensor([0.01, 0.3, torch.pi / 4, 1.2, 1.57, torch.pi / 2], dtype=torch.float64), sd * normal(6, 3)
    s = t.sin() / (t.sin() + t.cos())
    q = (s.square() + (1 - s).square()).sqrt()
    x_flow = q[:, None] * x / sd
    weights = ((1 - 2 * s) / q)[:, None], ((1 - 2 * s + 2 * s.square()) / q)[:, None]
    f = weights[0] * x_flow + weights[1] * flow.output(x_flow, s)
    ours = SNRMatched(flow, TrigFlow(sigma_data=1.0))(x / sd, t)
    torch.testing.assert_close(ours.trigflow, f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sd * ours.x0, t.cos()[:, None] * x - t.sin()[:, None] * sd * f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights[1][2], 0.5 / q[2, None], rtol=1e-12, atol=0)
    assert weights[0][2].abs() < 1e-12


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_noise_prediction_under_trigflow_is_the_sheets_formula(sd: float) -> None:
    """``F = (z - sin t x) / (sd cos t)`` with ``z = sd eps``, and the state ``sd x / sqrt(a^2 sd^2 + s^2)``."""
    vp, here = stable_diffusion(), TrigFlow(sigma_data=sd)
    network = Network(vp, "epsilon")
    a, s = vp.alpha(ROWS)[:, None], vp.sigma(ROWS)[:, None]
    x_vp = normal(5, 3)
    x = sd * x_vp / (a.square() * sd**2 + s.square()).sqrt()
    t = torch.atan(vp.nsr(ROWS) / sd)
    matched, row = match_state(x, t, here, vp)
    torch.testing.assert_close(matched, x_vp, rtol=1e-12, atol=1e-12)
    assert torch.equal(row, ROWS)
    f = (sd * network.output(x_vp, ROWS) - t.sin()[:, None] * x) / (sd * t.cos()[:, None])
    torch.testing.assert_close(SNRMatched(network, here)(x, t).trigflow, f, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_a_deterministic_step_is_the_same_step_in_both(inner: str, outer: str) -> None:
    """DDIM, Euler of a flow and of EDM, and the circle's own step are one step, ``a_u x0 + s_u eps``, seen in four scales."""
    there, here = PROCESSES[inner], PROCESSES[outer]
    x_t, t = states(here)
    prediction = SNRMatched(Network(there, "sample"), here)(x_t[1:], t[1:])
    stepped = here.add_noise(prediction.x0, prediction.eps, t[:-1])
    x, u = match_state(x_t[1:], t[1:], here, there)
    original = Network(there, "sample")(x, u)
    end, at = match_state(stepped, t[:-1], here, there)
    torch.testing.assert_close(end, there.add_noise(original.x0, original.eps, at), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 4.5])
@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_guidance_commutes_with_matching(name: str, scale: float) -> None:
    flow, here = mixture(RectifiedFlow()), TrigFlow()
    (x_t, t), cond = states(here), torch.tensor([0, 1, 1, 0, 1])
    matched = SNRMatched(flow, here)
    outside = guide(matched(x_t, t, cond).output(name), matched(x_t, t).output(name), scale)
    x, s = match_state(x_t, t, here, flow.process)
    inside = Prediction(x_t, t, guide(flow(x, s, cond).x0, flow(x, s).x0, scale), here)
    torch.testing.assert_close(outside, inside.output(name), rtol=1e-9, atol=1e-9)


def test_two_wrappers_are_one() -> None:
    vp, here = stable_diffusion(), TrigFlow()
    x_t, t = states(here)
    twice = SNRMatched(SNRMatched(Network(vp, "epsilon"), EDM()), here)
    torch.testing.assert_close(twice(x_t, t).x0, SNRMatched(Network(vp, "epsilon"), here)(x_t, t).x0, rtol=1e-10, atol=1e-10)


def test_network_of_rows_is_asked_at_rows_and_at_snapped_times_without_error() -> None:
    """Between rows its answer is that of a state of another noise: an error of the order of the distance in log r."""
    vp, here = stable_diffusion(), RectifiedFlow()
    matched, direct = SNRMatched(mixture(vp), here), mixture(here)
    t = here.t_from_nsr(vp.continuous().nsr(torch.tensor([0.4, 20.3, 300.4, 700.25, 998.6]).double()))
    _, row = match_state(normal(5, 3), t, here, vp)
    assert row.tolist() == [0, 20, 300, 700, 999]
    snapped = snap_time(t, here, vp)
    torch.testing.assert_close(here.nsr(snapped), vp.nsr(row), rtol=1e-10, atol=0)
    errors = []
    for times in (t, snapped):
        x_t = here.add_noise(normal(5, 3), normal(5, 3, seed=2), times)
        errors.append((matched(x_t, times).x0 - direct(x_t, times).x0).abs().max().item())
    assert 1e-4 < errors[0] < 0.1
    assert errors[1] < 1e-10
    for target in (vp.continuous(), EDM(), TrigFlow()):
        torch.testing.assert_close(snap_time(t, here, target), t, rtol=1e-10, atol=1e-12)


def test_continuous_view_of_the_same_network_has_no_rows() -> None:
    view, here = stable_diffusion().continuous(), RectifiedFlow()
    t = here.t_from_nsr(view.nsr(torch.tensor([0.4, 20.3, 300.4, 700.25, 998.6]).double()))
    x_t = here.add_noise(normal(5, 3), normal(5, 3, seed=2), t)
    matched, direct = SNRMatched(mixture(view), here), mixture(here)
    torch.testing.assert_close(matched(x_t, t).x0, direct(x_t, t).x0, rtol=1e-10, atol=1e-10)


def test_beyond_a_table_its_ends_answer() -> None:
    """Stable Diffusion's last row has r = 14.6; pure noise of a flow is given to it with the variance it knows."""
    vp, here = stable_diffusion(), RectifiedFlow()
    x, row = match_state(torch.full((2, 3), 1.5).double(), torch.tensor([1.0, 1e-6]).double(), here, vp)
    assert row.tolist() == [999, 0]
    torch.testing.assert_close(x, torch.full((2, 3), 1.5).double(), rtol=1e-5, atol=0)


def test_state_keeps_its_dtype_and_times_are_exact() -> None:
    """A time rounded to the state's float32 would be another row, and TrigFlow's last time would be past its end."""
    vp, here = stable_diffusion(), TrigFlow()
    x_t, t = states(here)
    x, row = match_state(x_t.float(), t, here, vp)
    assert x.dtype == torch.float32
    assert torch.equal(row, ROWS)
    x, s = match_state(x_t.float(), t, here, RectifiedFlow())
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, RectifiedFlow().t_from_nsr(vp.nsr(ROWS)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("inner", ["edm", "flow", "trigflow of unit data", "continuous vp"])
def test_tangent_goes_through_the_change_of_time_and_scale(inner: str) -> None:
    """sCM differentiates the wrapped network along the path; without the map's own derivative the tangent is another one."""
    here = TrigFlow()
    matched, (x_t, t) = SNRMatched(mixture(PROCESSES[inner]), here), states(here)
    x_t, t, dx = x_t[1:4], t[1:4] + 1e-4, normal(3, 3, seed=3)
    _, tangent = torch.func.jvp(lambda x, time: matched(x, time).x0, (x_t, t), (dx, torch.ones_like(t)))
    h = 1e-6
    central = (matched(x_t + h * dx, t + h).x0 - matched(x_t - h * dx, t - h).x0) / (2 * h)
    assert (tangent - central).norm() < 1e-6 * central.norm()
