"""The one convention of guidance, and its rules against closed forms and diffusers' guiders."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.hooks import LayerSkipConfig
from tiny import BETAS

from fastdiff.diffusion import NoiseProcess, Prediction, ddim_step, guide, process_from_scheduler
from fastdiff.diffusion.guidance import (
    apg,
    apg_difference,
    autoguidance,
    cfg_plus_plus_step,
    cfg_zero_star,
    interval,
    rescale,
    rescaled,
    scale_from_diffusers,
    scale_from_w,
    tcfg,
    w_from_scale,
    zero_init,
)
from fastdiff.diffusion.prediction import PREDICTION_TYPES, convert
from fastdiff.diffusion.process import EDM, ContinuousVP, RectifiedFlow, TrigFlow

PROCESS, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
PROCESSES = [PROCESS, ContinuousVP(PROCESS.alphas_cumprod), EDM(), RectifiedFlow(), TrigFlow(sigma_data=0.7)]
RULES = {
    "guide": guide,
    "rescaled": partial(rescaled, factor=0.7),
    "autoguidance": autoguidance,
    "apg": partial(apg, eta=0.3, radius=2.0),
    "cfg_zero_star": cfg_zero_star,
    "tcfg": tcfg,
}
Rule = Callable[..., torch.Tensor]
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def two(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    c, u = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return c, u


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_is_off_zero_is_unconditional_and_two_extrapolates() -> None:
    c, u = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(guide(c, u, 1), c)
    assert torch.equal(guide(c, u, 0), u)
    assert torch.equal(guide(c, u, 2), torch.tensor([5.0, -3.0]))


@pytest.mark.parametrize("w", [0.0, 0.75, 6.5])
def test_scale_of_the_other_convention(w: float) -> None:
    c, u = two()
    torch.testing.assert_close(guide(c, u, scale_from_w(w)), c + w * (c - u), rtol=1e-12, atol=1e-12)
    assert w_from_scale(scale_from_w(w)) == w


def test_a_pipeline_called_with_zero_is_unguided_and_not_unconditional() -> None:
    """Distilled students are called with guidance_scale=0 or 1; diffusers guides only above 1."""
    assert [scale_from_diffusers(g) for g in (0.0, 0.5, 1.0, 1.5, 7.5)] == [1.0, 1.0, 1.0, 1.5, 7.5]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_commutes_with_every_conversion(scale: float, process: NoiseProcess) -> None:
    """Guidance on x0 with the unguided eps kept would break the DDIM step: both come from one guided quantity."""
    r = torch.tensor([0.05, 0.3, 1.0, 4.0, 12.0], dtype=torch.float64)
    t = process.t_from_nsr(r)
    x_t, _ = two(1)
    for source in PREDICTION_TYPES:
        c, u = two(2)
        for target in PREDICTION_TYPES:
            change = partial(convert, x_t=x_t, t=t, process=process, source=source, target=target)
            after, before = change(guide(c, u, scale)), guide(change(c), change(u), scale)
            assert (after - before).norm() < 1e-10 * (change(c).norm() + change(u).norm()), (source, target)


def test_scale_may_differ_between_samples() -> None:
    c, u = two()
    scales = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    guided = guide(c, u, scales[:, None, None])
    assert torch.equal(guided, torch.stack([guide(c[i], u[i], s) for i, s in enumerate(scales.tolist())]))
    assert torch.equal(guide(c, u, scales), guided)


def test_one_scale_a_sample_is_not_broadcast_over_the_last_dimension() -> None:
    """[B] against [B, B] broadcasts silently over columns; the scales are of samples."""
    c, u = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.zeros(2, 2)
    assert torch.equal(guide(c, u, torch.tensor([2.0, 3.0])), torch.tensor([[2.0, 2.0], [3.0, 3.0]]))


@every_rule
def test_one_is_off_bit_for_bit_in_every_rule(rule: Rule) -> None:
    c, u = (x.float() for x in two())
    assert torch.equal(rule(c, u, 1.0), c)
    mixed = rule(c, u, torch.tensor([1.0, 3.0, 1.0, 0.5, 1.0]))
    assert torch.equal(mixed[[0, 2, 4]], c[[0, 2, 4]])
    assert not torch.isclose(mixed[[1, 3]], c[[1, 3]]).all()


def test_plain_guidance_at_one_does_no_work() -> None:
    """Not even a copy; and what was not computed, NaN here, cannot leak in."""
    c, u = two()
    assert guide(c, u, 1.0) is c
    assert guide(c, u, 1) is c
    assert torch.equal(guide(c, u * torch.nan, torch.ones(5)), c)


@every_rule
def test_samples_do_not_see_each_other(rule: Rule) -> None:
    """Statistics over the batch would tie each sample to its neighbours: pictures would change with the batch size."""
    (c, u), scale = two(), torch.tensor([0.5, 1.5, 3.0, 5.0, 7.5])
    whole = rule(c, u, scale)
    c[1:], u[1:] = 100 * c[1:], -3 * u[1:]
    assert torch.equal(rule(c, u, scale)[0], whole[0])
    torch.testing.assert_close(rule(c[:1], u[:1], scale[:1]), whole[:1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rule(c[:1], u[:1], 0.5), whole[:1], rtol=1e-13, atol=1e-13)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rules_keep_the_dtype_and_take_their_statistics_in_float32(rule: Rule, dtype: torch.dtype) -> None:
    """In float16 the squares of 4,096 elements of standard deviation 10 add up to infinity."""
    c, u = 10 * torch.randn(2, 2, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    u = c + u / 2  # of orthogonal ones of equal norm the singular vectors are undetermined
    guided = rule(c, u, 3.0)
    exact = rule(c.double(), u.double(), 3.0)
    assert guided.dtype == dtype
    assert (guided - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_interval_is_off_outside_and_follows_the_times() -> None:
    t = torch.tensor([0, 200, 201, 800, 801, 999])
    assert interval(5.0, t, 200, 800).tolist() == [1.0, 1.0, 5.0, 5.0, 1.0, 1.0]
    scales = torch.arange(2.0, 8.0)
    assert interval(scales, t, 200, 800).tolist() == [1.0, 1.0, 4.0, 5.0, 1.0, 1.0]
    assert interval(0.1, t.double(), 200, 800)[2].item() == 0.1
    c, u = two()
    guided = guide(c, u, interval(5.0, t[:5], 200, 800))
    assert torch.equal(guided[[0, 1, 4]], c[[0, 1, 4]])
    assert torch.equal(guided[2:4], guide(c, u, 5.0)[2:4])


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(scale: float, factor: float) -> None:
    c, u = two()
    guider = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=factor)
    close(rescaled(c, u, scale, factor=factor), guider.forward(c, u).pred)
    std = rescale(guide(c, u, scale), c, 1.0).flatten(1).std(1)
    torch.testing.assert_close(std, c.flatten(1).std(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("radius", [None, 1.5, 100.0])
def test_adaptive_projection_is_that_of_diffusers(scale: float, eta: float, radius: float | None) -> None:
    """With its conditional base, the paper's; three steps of momentum -0.5."""
    guider = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1, eta=eta, adaptive_projected_guidance_rescale=radius or 0.0, use_original_formulation=True
    )
    close(apg(*two(), scale, eta=eta, radius=radius), guider.forward(*two()).pred)
    guider.momentum_buffer, state = MomentumBuffer(-0.5), None
    for step in range(3):
        c, u = two(step)
        state = apg_difference(c, u, state, -0.5)
        close(apg(c, u, scale, eta=eta, radius=radius, difference=state), guider.forward(c, u).pred)


def test_adaptive_projection_by_hand() -> None:
    """Along cond there is nothing left at eta = 0, all of it at eta = 1; the radius bounds the whole difference."""
    c, u = two()
    torch.testing.assert_close(apg(c, u, 4.0, eta=1.0), guide(c, u, 4.0), rtol=1e-12, atol=1e-12)
    moved = (apg(c, u, 4.0) - c).flatten(1)
    assert (moved * c.flatten(1)).sum(1).abs().max() < 1e-12
    assert moved.norm() > 1
    bounded = (apg(c, u, 4.0, eta=1.0, radius=0.5) - c).flatten(1)
    torch.testing.assert_close(bounded.norm(dim=1), torch.full((5,), 1.5, dtype=torch.float64), rtol=1e-12, atol=0)
    assert apg(torch.zeros_like(c), u, 4.0).isfinite().all()
    assert torch.equal(apg(c, c, 4.0, radius=0.5), c)


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_zero_star_is_that_of_diffusers(scale: float) -> None:
    c, u = two()
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=scale, zero_init_steps=2)
    for step in range(4):
        guider.set_state(step, 10, None)
        close(zero_init(cfg_zero_star(c, u, scale), step, 2), guider.forward(c, u).pred)
    left = u - cfg_zero_star(c, u, 0.0)
    nearest = cfg_zero_star(c, u, 0.0)
    assert ((c - nearest) * u).flatten(1).sum(1).abs().max() < 1e-7
    assert left.norm() > 0.1


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_tangential_guidance_is_that_of_diffusers(scale: float) -> None:
    for c, u in (two(), (two()[0], two()[0] + 0.1 * two()[1]), (two()[0], -two()[0] + 0.1 * two()[1])):
        close(tcfg(c, u, scale), TangentialClassifierFreeGuidance(guidance_scale=scale).forward(c, u).pred)


def test_tangential_guidance_removes_the_second_singular_vector() -> None:
    """scale 0 is what is left of uncond: its part on the first right-singular vector, here from a float64 SVD."""
    c, u = two()
    _, _, right = torch.linalg.svd(torch.stack([c.flatten(1), u.flatten(1)], dim=1), full_matrices=False)
    kept = (u.flatten(1) * right[:, 0]).sum(1, keepdim=True) * right[:, 0]
    torch.testing.assert_close(tcfg(c, u, 0.0), kept.reshape_as(u), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tcfg(c, c, 3.0), c, rtol=1e-12, atol=1e-12)
    assert tcfg(torch.zeros_like(c), torch.zeros_like(c), 3.0).isfinite().all()


def test_autoguidance_is_that_of_diffusers() -> None:
    c, weak = two()
    skipped = LayerSkipConfig(indices=[0], fqn="blocks", skip_attention=False, skip_ff=True)
    close(autoguidance(c, weak, 2.5), AutoGuidance(guidance_scale=2.5, auto_guidance_config=skipped).forward(c, weak).pred)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_cfg_plus_plus_is_guidance_of_a_varying_scale(process: NoiseProcess) -> None:
    x_t, (c, u) = two(1)[0], two(2)
    t, earlier = (process.t_from_nsr(torch.full((5,), r, dtype=torch.float64)) for r in (3.0, 1.2))
    cond, uncond = (Prediction(x_t, t, x0, process) for x0 in (c, u))
    scale = 0.6 / (1 - process.nsr(earlier) / process.nsr(t))
    expected = ddim_step(Prediction(x_t, t, guide(c, u, scale), process), earlier)
    torch.testing.assert_close(cfg_plus_plus_step(cond, uncond, earlier, 0.6), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cfg_plus_plus_step(cond, uncond, earlier, 0.0), ddim_step(uncond, earlier), rtol=1e-12, atol=1e-12)
    assert torch.equal(cfg_plus_plus_step(cond, uncond, None, 0.6), guide(c, u, 0.6))
