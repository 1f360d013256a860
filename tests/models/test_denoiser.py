"""A network as a denoiser: one conversion, one convention of guidance, no call too many."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import NoiseProcess, process_from_scheduler
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.guidance import apg, cfg_zero_star, rescaled
from fastdiff.diffusion.process import EDM, ContinuousVP, TrigFlow
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.law import LawDenoiser

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


@pytest.mark.parametrize(("process", "kind", "sign"), [(EDM(sigma_data=0.7), "edm", 1), (TrigFlow(sigma_data=0.7), "trigflow", -1)])
def test_edm_networks_see_a_scaled_input_and_the_prediction_the_state(process: NoiseProcess, kind: str, sign: int) -> None:
    """D = c_skip x + c_out F(c_in x, c_noise) by hand; an unscaled input would go unnoticed in every shape and loss."""
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        seen.append((x, t))
        return x.tanh() * cond

    x, _, cond, _ = batch()
    t = process.t_from_nsr(torch.tensor([0.1, 0.7, 2.0, 9.0], dtype=torch.float64))
    prediction = Denoiser(network, process, kind)(x, t, cond)
    a, s = process.alpha(t)[:, None], process.sigma(t)[:, None]
    q = (a**2 * 0.49 + s**2).sqrt()
    torch.testing.assert_close(seen[0][0], x / q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][1], t.log() / 4 if kind == "edm" else t, rtol=1e-12, atol=1e-12)
    x0 = 0.49 * a / q**2 * x + sign * 0.7 * s / q * ((x / q).tanh() * cond)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-12, atol=1e-12)
    assert prediction.x_t is x


def test_other_networks_see_the_state_itself() -> None:
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    x, t, cond, _ = batch()
    Denoiser(network, PROCESS, "epsilon")(x, t, cond)
    assert seen[0] is x


@pytest.mark.parametrize("scale", [3.0, torch.tensor([0.0, 1.0, 2.0, 7.5])])
def test_two_calls_give_what_one_of_double_batch_gives(scale: float | torch.Tensor) -> None:
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser = Denoiser(network, PROCESS, "v_prediction")
    together = denoiser.guided(x, t, cond, null, scale)
    apart = denoiser.guided(x, t, cond, null, scale, batched=False)
    assert network.calls == [8, 4, 4]
    torch.testing.assert_close(together.x0, apart.x0, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batched", [True, False])
def test_every_sample_has_its_own_scale(batched: bool) -> None:
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser, scales = Denoiser(network, PROCESS, "epsilon"), torch.tensor([0.0, 1.0, 2.0, 7.5])
    guided = denoiser.guided(x, t, cond, null, scales, batched=batched).x0
    for i, scale in enumerate(scales.tolist()):
        alone = denoiser.guided(x[i : i + 1], t[i : i + 1], cond[i : i + 1], null[i : i + 1], scale).x0
        torch.testing.assert_close(guided[i : i + 1], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("combine", [None, partial(rescaled, factor=0.7), partial(apg, radius=0.1), cfg_zero_star])
def test_no_null_pass_when_every_scale_is_one(combine) -> None:
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser, options = Denoiser(network, PROCESS, "epsilon"), {} if combine is None else {"combine": combine, "on": "epsilon"}
    for batched in (True, False):
        guided = denoiser.guided(x, t, cond, null, torch.ones(4), batched=batched, **options)
        assert torch.equal(guided.x0, denoiser(x, t, cond).x0)
    assert set(network.calls) == {4}
    assert len(network.calls) == 4


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_rule_acts_on_the_parametrisation_it_is_given(kind: str, batched: bool) -> None:
    """Rescaling is no affine map: on the network's output it is that of diffusers' pipelines, on x0 another one."""
    network, (x, t, cond, null) = Recorder(), batch()
    denoiser, rule = Denoiser(network, PROCESS, kind), partial(rescaled, factor=0.7)
    time = PROCESS.network_time(t)
    output = rule(network(x, time, cond), network(x, time, null), 3.0)
    on_output = denoiser.guided(x, t, cond, null, 3.0, combine=rule, on=kind, batched=batched)
    torch.testing.assert_close(on_output.output(kind), output, rtol=1e-9, atol=1e-9)
    on_x0 = denoiser.guided(x, t, cond, null, 3.0, combine=rule)
    expected = rule(denoiser(x, t, cond).x0, denoiser(x, t, null).x0, 3.0)
    torch.testing.assert_close(on_x0.x0, expected, rtol=1e-12, atol=1e-12)
    assert (on_x0.x0 - on_output.x0).norm() > 1e-2 * on_x0.x0.norm()
    plain = [denoiser.guided(x, t, cond, null, 3.0, on=on).x0 for on in ("sample", "epsilon", "v_prediction", "score")]
    for x0 in plain[1:]:
        torch.testing.assert_close(x0, plain[0], rtol=1e-9, atol=1e-9)


def test_the_continuous_view_is_the_same_at_the_rows_and_between_their_neighbours_elsewhere() -> None:
    x, t, cond, _ = batch()
    denoiser = Denoiser(Recorder(), PROCESS, "epsilon")
    view = denoiser.continuous()
    assert isinstance(view.process, ContinuousVP)
    torch.testing.assert_close(view(x, t.double(), cond).x0, denoiser(x, t, cond).x0, rtol=1e-10, atol=1e-10)
    rows = [denoiser(x[2:3], t[2:3] + step, cond[2:3]).x0 for step in (0, 1)]
    between = view(x[2:3], t[2:3] + 0.5, cond[2:3]).x0
    assert ((between - rows[0]) * (between - rows[1])).max() < 0
    edm = Denoiser(Recorder(), EDM(), "edm")
    assert edm.continuous() is edm


def test_the_continuous_view_of_a_law_is_the_law_and_still_counted() -> None:
    counted: list[int] = []
    law = GaussianMixture.ring(PROCESS)
    view = LawDenoiser(law, count=counted.append).continuous()
    x, t = batch()[:2]
    torch.testing.assert_close(view(x, t.double(), None).x0, law(x, t).x0, rtol=1e-10, atol=1e-10)
    assert counted == [4]
    assert law.process is PROCESS
