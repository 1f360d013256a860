"""Continuous-time consistency: the tangent, its discrete form and its fixed point."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fastdiff.losses import (
    consistency,
    discrete_tangent,
    inverse_sigma_weight,
    normalise_tangent,
    premultiplied_tangents,
    scm,
    scm_tangent,
)

Network = Callable[[Tensor, Tensor], Tensor]
SD = 0.5
M, V = 0.7, 0.9  # data N(M, V): with V = SD^2 the trajectories would be trivial
TIMES = torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1)


def total(t: Tensor) -> Tensor:
    return t.cos().square() * V + t.sin().square() * SD**2


def states() -> tuple[Tensor, Tensor]:
    """x_t [3, 4] and the exact velocity of the probability-flow ODE there."""
    t = column(TIMES)
    x_t = t.cos() * (M + V**0.5 * normal(3, 4)) + t.sin() * SD * normal(3, 4, seed=1)
    return x_t, velocity(x_t, t)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return -t.sin() * M + t.sin() * t.cos() * (SD**2 - V) / total(t) * (x - t.cos() * M)


def exact_network(y: Tensor, t: Tensor) -> Tensor:
    """F of the exact consistency function f = M + sqrt(V / V_t) (x - cos t M), from y = x / SD."""
    x, t = SD * y, column(t)
    f = M + (V / total(t)).sqrt() * (x - t.cos() * M)
    return (t.cos() * x - f) / (SD * t.sin())


def network(y: Tensor, t: Tensor) -> Tensor:
    """Any smooth F."""
    return (1.3 * y + column(t)).tanh() + 0.2 * y.square()


def consistency_function(net: Network, x: Tensor, t: Tensor) -> Tensor:
    return column(t).cos() * x - SD * column(t).sin() * net(x / SD, t)


def tangent(net: Network, x: Tensor, t: Tensor, v: Tensor, warmup: float = 1.0) -> Tensor:
    prediction, output = jvp(net, (x / SD, t), premultiplied_tangents(v, t, sigma_data=SD))
    return scm_tangent(x, t, prediction, v, output, sigma_data=SD, warmup=warmup)


def test_tangent_is_cos_t_times_the_derivative_of_the_consistency_function() -> None:
    """By forward mode along (v, 1), and by central differences."""
    x, v = states()
    got = tangent(network, x, TIMES, v)
    _, derivative = jvp(lambda x, t: consistency_function(network, x, t), (x, TIMES), (v, torch.ones(3).double()))
    torch.testing.assert_close(got, column(TIMES).cos() * derivative, rtol=1e-10, atol=1e-12)
    h = 1e-5
    ends = [consistency_function(network, x + s * h * v, TIMES + s * h) for s in (1, -1)]
    torch.testing.assert_close(got, column(TIMES).cos() * (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_exact_consistency_function_of_a_gaussian_is_a_fixed_point() -> None:
    x, v = states()
    assert v.abs().min() > 1e-3
    g = tangent(exact_network, x, TIMES, v)
    assert g.abs().max() < 1e-13
    prediction = exact_network(x / SD, TIMES).requires_grad_()
    (gradient,) = torch.autograd.grad(scm(prediction, g).sum(), prediction)
    assert gradient.abs().max() < 1e-12


def test_without_warm_up_it_is_the_regression_of_the_network_to_the_velocity_under_cos_squared() -> None:
    x, v = states()
    prediction = network(x / SD, TIMES).requires_grad_()
    g = scm_tangent(x, TIMES, prediction.detach(), v, normal(3, 4), sigma_data=SD, warmup=0.0)
    (got,) = torch.autograd.grad(scm(prediction, g).sum(), prediction)
    regression = column(TIMES).cos().square() * (SD * prediction - v).square() / SD
    (want,) = torch.autograd.grad(regression.sum(), prediction)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_warm_up_interpolates_linearly() -> None:
    x, v = states()
    none, half, full = (tangent(network, x, TIMES, v, warmup=r) for r in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2, rtol=1e-12, atol=1e-14)


def test_premultiplied_tangents_stay_finite_in_half_precision_at_the_noisiest_time() -> None:
    """1 / cos t is 2e7 there in float32 and overflows float16; cos t sin t is 0."""
    t = torch.tensor([math.pi / 2])
    tangents = premultiplied_tangents(torch.ones(1, 2), t, sigma_data=SD)
    assert max(x.abs().max().item() for x in tangents) < 1e-6
    _, v = states()
    along_x, along_t = premultiplied_tangents(v, TIMES, sigma_data=SD)
    torch.testing.assert_close(along_x, column(along_t) * v / SD, rtol=1e-12, atol=0)
    torch.testing.assert_close(along_t, (2 * TIMES).sin() / 2, rtol=1e-12, atol=0)


# --- the discrete form


def step(x: Tensor, v: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """The teacher's DDIM step from TIMES to TIMES - dt."""
    d = torch.tensor(dt, dtype=torch.float64)
    return d.cos() * x - d.sin() * v, TIMES - dt


def test_discrete_tangent_is_the_difference_of_the_consistency_function() -> None:
    x, v = states()
    x_u, u = step(x, v, 0.1)
    got = discrete_tangent(x, TIMES, u, network(x / SD, TIMES), network(x_u / SD, u), v, sigma_data=SD)
    want = (consistency_function(network, x, TIMES) - consistency_function(network, x_u, u)) / math.sin(0.1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_discrete_tangent_tends_to_the_continuous_one_at_first_order(warmup: float) -> None:
    x, v = states()
    limit = tangent(network, x, TIMES, v, warmup=warmup)

    def error(dt: float) -> float:
        x_u, u = step(x, v, dt)
        options = {"sigma_data": SD, "warmup": warmup}
        discrete = discrete_tangent(x, TIMES, u, network(x / SD, TIMES), network(x_u / SD, u), v, **options)
        return (column(TIMES).cos() * discrete - limit).norm().item()

    assert error(1e-4) < 1e-3
    assert error(1e-3) / error(5e-4) == pytest.approx(2, rel=0.02)


def test_gradient_of_the_discrete_loss_tends_to_that_of_scm() -> None:
    """Over dt and under the weight cos t / (sd sin t) consistency distillation becomes the un-normalised sCM, with error O(dt)."""
    x, v = states()
    prediction = network(x / SD, TIMES).requires_grad_()
    (limit,) = torch.autograd.grad(scm(prediction, tangent(network, x, TIMES, v)).sum(), prediction)

    def error(dt: float) -> float:
        x_u, u = step(x, v, dt)
        f_t = column(TIMES).cos() * x - SD * column(TIMES).sin() * prediction
        loss = consistency(f_t, consistency_function(network, x_u, u)) / (SD * column(TIMES).tan())
        (gradient,) = torch.autograd.grad(loss.sum(), prediction)
        return (gradient / dt - limit).norm().item()

    assert error(1e-4) < 1e-3
    assert error(1e-3) / error(5e-4) == pytest.approx(2, rel=0.02)


# --- normalisation, loss and weights


def test_normalised_tangents_closed_forms() -> None:
    g = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(normalise_tangent(g, c=0.1), g / 5.1, rtol=1e-12, atol=0)
    torch.testing.assert_close(normalise_tangent(g, kind="rms", c=0.1), g / 2.6, rtol=1e-12, atol=0)
    assert torch.equal(normalise_tangent(g, kind="clip"), g.clamp(-1, 1))
    with pytest.raises(ValueError, match="rms"):
        normalise_tangent(g, kind="l2")


def test_rms_does_not_depend_on_the_resolution_and_the_norm_does() -> None:
    """A tiled image: c weighs the same beside the RMS; beside the L2 norm it disappears as n grows."""
    g = 0.05 * normal(2, 3, 4, 4)
    tiled = g.repeat(1, 1, 8, 8)
    torch.testing.assert_close(
        normalise_tangent(tiled, kind="rms")[..., :4, :4], normalise_tangent(g, kind="rms"), rtol=1e-12, atol=0
    )
    norms = [normalise_tangent(x).flatten(1).norm(dim=1) for x in (g, tiled)]
    assert (norms[0] < 0.9).all()
    assert (norms[1] > norms[0]).all()


def test_the_normaliser_of_a_sample_ignores_the_others() -> None:
    """A whole-batch norm lets one sample with a large tangent silence the rest."""
    g = normal(3, 4)
    louder = g.clone()
    louder[1] *= 100
    for kind in ("norm", "rms", "clip"):
        assert torch.equal(normalise_tangent(louder, kind=kind)[[0, 2]], normalise_tangent(g, kind=kind)[[0, 2]])


def test_gradient_is_minus_two_weights_times_the_tangent() -> None:
    prediction, g, w = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), torch.tensor([0.3, -1.0, 2.0]).double()
    extra = inverse_sigma_weight(TIMES, sigma_data=SD)
    loss = scm(prediction, g, log_weight=w, weight=extra)
    torch.testing.assert_close(loss, column(w.exp() * extra) * g.square() - column(w), rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad(loss.mean(dim=1).sum(), prediction)
    torch.testing.assert_close(got, -2 * column(w.exp() * extra) * g / 4, rtol=1e-10, atol=1e-12)


def test_neither_the_tangent_nor_the_frozen_prediction_is_differentiated() -> None:
    prediction = normal(3, 4).requires_grad_()
    g = 2 * prediction  # a tangent that remembers the network
    (got,) = torch.autograd.grad(scm(prediction, g).sum(), prediction)
    torch.testing.assert_close(got, -2 * g.detach(), rtol=1e-10, atol=1e-12)


def test_the_learned_weight_is_stationary_at_the_inverse_of_the_loss() -> None:
    g = normal(3, 4)
    w = (-g.square().mean(dim=1).log()).requires_grad_()
    (gradient,) = torch.autograd.grad(scm(normal(3, 4), g, log_weight=w).sum(), w)
    assert gradient.abs().max() < 1e-12


def test_the_extra_weight_kills_the_time_of_one_step_sampling() -> None:
    t = torch.tensor([math.pi / 4, math.pi / 2], dtype=torch.float64)
    weight = inverse_sigma_weight(t, sigma_data=SD)
    assert weight[0].item() == pytest.approx(2, rel=1e-12)
    assert weight[1].abs() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, v = (y.to(dtype) for y in states())
    f, t = network(x / SD, TIMES.to(dtype)), TIMES.float()
    options = {"sigma_data": SD}
    for half, full in (
        (scm_tangent(x, t, f, v, f, **options), scm_tangent(x.float(), t, f.float(), v.float(), f.float(), **options)),
        (
            discrete_tangent(x, t, t - 0.1, f, f, v, **options),
            discrete_tangent(x.float(), t, t - 0.1, f.float(), f.float(), v.float(), **options),
        ),
        (normalise_tangent(x), normalise_tangent(x.float())),
        (scm(f, x, log_weight=t), scm(f.float(), x.float(), log_weight=t)),
        (premultiplied_tangents(v, t, **options)[0], premultiplied_tangents(v.float(), t, **options)[0]),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_numerical_gradient() -> None:
    g = normal(2, 2).requires_grad_()
    for kind in ("norm", "rms"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: normalise_tangent(x, kind=kind), (g,))
    w = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: scm(normal(2, 2), normal(2, 2, seed=1), log_weight=w), (w,))
