"""A network as a denoiser: one conversion, one convention of guidance, no call too many."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import NoiseProcess, process_from_scheduler
from fastdiff.models.denoiser import Denoiser

PROCESS: NoiseProcess = process_from_scheduler(DDIMScheduler(**BETAS).config)[0]


class Recorder(torch.nn.Module):
    """``tanh(x) cond + t / 1000``, and the samples of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return x.tanh() * cond + t.to(x)[:, None] / 1000


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, cond, null = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 20, 500, 999]), cond, null


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_by_hand(kind: str) -> None:
    network, (x, t, cond, _) = Recorder(), batch()
    prediction = Denoiser(network, PROCESS, kind)(x, t, cond)
    out = x.tanh() * cond + t.double()[:, None] / 1000
    abar = PROCESS.alphas_cumprod[t][:, None]
    x0 = {
        "epsilon": (x - (1 - abar).sqrt() * out) / abar.sqrt(),
        "v_prediction": abar.sqrt() * x - (1 - abar).sqrt() * out,
        "sample": out,
    }[kind]
    assert (prediction.x0 - x0).abs().max() < 1e-12
    assert (prediction.eps - (x - abar.sqrt() * x0) / (1 - abar).sqrt()).abs().max() < 1e-11
    assert prediction.x_t is x
    assert prediction.t is t


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_one_call_of_double_batch_equals_two_calls(scale: float) -> None:
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser = Denoiser(network, PROCESS, "epsilon")
    guided = denoiser.guided(x, t, cond, null, scale)
    assert network.calls == [8]
    uncond, conditional = denoiser(x, t, null), denoiser(x, t, cond)
    assert (guided.x0 - (uncond.x0 + scale * (conditional.x0 - uncond.x0))).abs().max() < 1e-12
    assert (guided.eps - (uncond.eps + scale * (conditional.eps - uncond.eps))).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1, 1.0])
def test_no_null_pass_at_scale_one(scale: float) -> None:
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser = Denoiser(network, PROCESS, "epsilon")
    guided = denoiser.guided(x, t, cond, null, scale)
    assert network.calls == [4]
    assert torch.equal(guided.x0, denoiser(x, t, cond).x0)


def test_dict_conditions_reach_the_network_null_first() -> None:
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: dict) -> torch.Tensor:
        seen.append(cond["text"])
        return x * cond["text"]

    x, t, cond, null = batch()
    Denoiser(network, PROCESS, "sample").guided(x, t, {"text": cond}, {"text": null}, 2.0)
    assert torch.equal(seen[0], torch.cat([null, cond]))


def test_gradient_reaches_the_network_and_the_input() -> None:
    """d x0 / d eps = -s / a exactly, through guidance too."""
    x, t, cond, null = batch()
    x.requires_grad_()
    cond.requires_grad_()
    Denoiser(Recorder(), PROCESS, "epsilon").guided(x, t, cond, null, 3.0).x0.sum().backward()
    a, s = PROCESS.alpha(t)[:, None], PROCESS.sigma(t)[:, None]
    torch.testing.assert_close(cond.grad, -3 * s / a * x.detach().tanh(), rtol=1e-10, atol=1e-12)
    slope = (3 * cond.detach() - 2 * null) * (1 - x.detach().tanh().square())
    torch.testing.assert_close(x.grad, (1 - s * slope) / a, rtol=1e-10, atol=1e-12)


def test_a_process_of_another_time_feeds_the_network_through_its_map() -> None:
    class Tenfold(type(PROCESS)):
        def network_time(self, t: torch.Tensor) -> torch.Tensor:
            return 10 * t

    x, t, cond, _ = batch()
    process = Tenfold(PROCESS.alphas_cumprod)
    fed = Denoiser(Recorder(), process, "sample")(x, t, cond)
    assert torch.equal(fed.x0, x.tanh() * cond + (10 * t).double()[:, None] / 1000)
    assert torch.equal(fed.t, t)
