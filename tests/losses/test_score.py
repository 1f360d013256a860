"""Score distillation: gradients, their normalisers and where they vanish."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import GaussianMixture, NoiseProcess, Prediction, process_from_scheduler
from fastdiff.losses import (
    F_DIVERGENCES,
    denoising,
    distribution_matching_gradient,
    f_divergence_weight,
    f_generator,
    pseudo_huber,
    pseudo_target,
    reduce,
    score_distillation_gradient,
    score_identity,
    trajectory_importance,
    trajectory_matching,
    variational_score_gradient,
)

PROCESS: NoiseProcess = process_from_scheduler(DDIMScheduler(**BETAS).config)[0]
HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(normal(count, 3, 2, 4, 5, dtype=dtype))


# --- the gradients


def test_vsd_is_sds_bitwise_when_the_fake_score_is_the_noise() -> None:
    real, eps = images(2, torch.float32)
    weight = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None]
    vsd = variational_score_gradient(real, eps, weight=weight)
    assert torch.equal(vsd, score_distillation_gradient(real, eps, weight=weight))
    assert torch.equal(vsd, weight * (real - eps))


def test_the_optimal_fake_score_of_one_particle_is_the_noise() -> None:
    """The score of a point mass at x, seen from x_t, is (x_t - a x) / s = eps: VSD with one particle is SDS."""
    x, eps = normal(1, 3), normal(5, 3, seed=1)
    t = torch.tensor([20, 250, 500, 750, 980])
    dirac = GaussianMixture(x, torch.zeros(1).double(), torch.ones(1).double(), PROCESS)
    x_t = PROCESS.add_noise(x.expand(5, 3), eps, t)
    assert (dirac(x_t, t).eps - eps).abs().max() < 1e-12


def test_dmd_closed_form_per_sample() -> None:
    x, real, fake = images(3)
    got = distribution_matching_gradient(x, real, fake)
    for i in range(3):
        want = (fake[i] - real[i]) / ((x[i] - real[i]).abs().sum() / x[i].numel())
        torch.testing.assert_close(got[i], want, rtol=1e-12, atol=0)


def test_another_sample_leaves_the_normaliser_bitwise_alone() -> None:
    """FastVideo divides by the mean of the whole batch: one far sample then quiets all others."""
    inputs = images(3, torch.float32)
    before = distribution_matching_gradient(*inputs)
    for changed in range(3):
        others = [v.clone() for v in inputs]
        others[changed][1] *= 100
        after = distribution_matching_gradient(*others)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert not torch.equal(after[1], before[1])


def test_equal_scores_give_zero() -> None:
    x, real, _ = images(3)
    assert torch.equal(distribution_matching_gradient(x, real, real.clone()), torch.zeros_like(x))
    assert torch.equal(variational_score_gradient(real, real.clone(), weight=0.3), torch.zeros_like(x))


@pytest.mark.parametrize("k", [0.25, 8.0])
def test_dmd_does_not_depend_on_the_scale_of_latents(k: float) -> None:
    x, real, fake = images(3)
    got = distribution_matching_gradient(k * x, k * real, k * fake)
    assert torch.equal(got, distribution_matching_gradient(x, real, fake))  # powers of two: exact


def test_a_sample_that_the_teacher_reproduces_is_not_divided_by_zero() -> None:
    x, _, fake = images(3)
    got = distribution_matching_gradient(x, x.clone(), fake, floor=0.5)
    torch.testing.assert_close(got, (fake - x) / 0.5, rtol=1e-12, atol=0)
    assert torch.equal(distribution_matching_gradient(x, x.clone(), x.clone()), torch.zeros_like(x))


def test_the_three_differences_are_one_direction() -> None:
    """x0_f - x0_r = (s^2/a)(S_f - S_r), and s^2 (eps_r - eps_f) = a s (x0_f - x0_r)."""
    t = torch.tensor([20, 500, 980])
    x_t, real_x0, fake_x0 = images(3)
    real, fake = Prediction(x_t, t, real_x0, PROCESS), Prediction(x_t, t, fake_x0, PROCESS)
    a, s = real.alpha, real.sigma
    torch.testing.assert_close(fake.x0 - real.x0, s.square() / a * (fake.score - real.score), rtol=1e-9, atol=1e-9)
    vsd = variational_score_gradient(real.eps, fake.eps, weight=s.square())
    torch.testing.assert_close(vsd, a * s * (fake.x0 - real.x0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_scores_are_subtracted_in_float32(dtype: torch.dtype) -> None:
    """Close scores cancel: in bfloat16 their difference has one or two digits left."""
    x, real, fake = (v.to(dtype) for v in images(3))
    wide = [v.float() for v in (x, real, fake)]
    for gradient, inputs, upcast in (
        (score_distillation_gradient, (real, fake), wide[1:]),
        (variational_score_gradient, (real, fake), wide[1:]),
        (distribution_matching_gradient, (x, real, fake), wide),
    ):
        got = gradient(*inputs)
        assert got.dtype == torch.float32, gradient.__name__
        assert torch.equal(got, gradient(*upcast)), gradient.__name__


# --- the loss that has the gradient


def test_pseudo_target_has_exactly_this_gradient() -> None:
    x, gradient, _ = images(3)
    x.requires_grad_()
    loss = pseudo_target(x, gradient)
    torch.testing.assert_close(loss, 0.5 * gradient.square(), rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad(reduce(loss), x)
    torch.testing.assert_close(got, gradient / x.numel(), rtol=1e-10, atol=1e-14)


def test_pseudo_target_stops_the_gradient_at_the_target_and_at_the_scores() -> None:
    x, gradient, _ = images(3)
    x.requires_grad_()
    gradient.requires_grad_()
    own = gradient * x  # a gradient that depends on x must not be differentiated
    (got,) = torch.autograd.grad(pseudo_target(x, own).sum(), x, retain_graph=True)
    torch.testing.assert_close(got, own.detach(), rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(pseudo_target(x, gradient).sum(), gradient, allow_unused=True)[0] is None


def test_non_finite_entries_stay_visible() -> None:
    """Zeroed, a teacher that puts out NaN would train nothing, with loss 0 and no error."""
    x = torch.zeros(4, requires_grad=True)
    gradient = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    (got,) = torch.autograd.grad(pseudo_target(x, gradient).sum(), x)
    assert got[0] == 1
    assert not got[1:].isfinite().any()


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, 2.0**-10), (torch.float16, 2.0**-10), (torch.float32, 2.0**-22)])
def test_pseudo_target_keeps_gradients_that_are_small_beside_x(dtype: torch.dtype, gradient: float) -> None:
    """x - G rounds to x when |G| is below half a unit of x: the student would stop, without an error."""
    x = torch.full((3,), 16.0, dtype=dtype, requires_grad=True)
    loss = pseudo_target(x, torch.full((3,), gradient, dtype=dtype))
    assert loss.dtype == torch.float32
    (got,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(got, torch.full((3,), gradient, dtype=dtype))


# --- denoising


def test_denoising_closed_form_and_change_of_parametrisation() -> None:
    """|x0' - x0|^2 = (s/a)^2 |eps' - eps|^2 and, variance preserving, |v' - v|^2 = |eps' - eps|^2 / a^2."""
    t = torch.tensor([20, 500, 980])
    x_t, x0, other = images(3)
    p, q = Prediction(x_t, t, x0, PROCESS), Prediction(x_t, t, other, PROCESS)
    a, s = p.alpha, p.sigma
    in_eps = denoising(p.eps, q.eps)
    torch.testing.assert_close(in_eps, (p.eps - q.eps).square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(denoising(p.x0, q.x0), denoising(p.eps, q.eps, weight=(s / a).square()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(denoising(p.v, q.v), in_eps / a.square(), rtol=1e-9, atol=1e-12)


def test_denoising_is_least_at_the_posterior_mean() -> None:
    """Expectations over (x0, x_t) by quadrature: the best affine denoiser of N(m, v) is the exact posterior mean."""
    m, v, t = 0.7, 0.3, torch.tensor([400])
    z, e, w = quadrature()
    x0 = m + v**0.5 * z
    x_t = PROCESS.add_noise(x0, e, t.expand(len(z)))
    exact = gaussian(m, v**0.5)(x_t, t.expand(len(z))).x0
    gain, shift = torch.ones(1).double().requires_grad_(), torch.zeros(1).double().requires_grad_()
    risk = (w * denoising(gain * exact + shift, x0)).sum()
    gradients = torch.autograd.grad(risk, (gain, shift))
    assert max(g.abs().item() for g in gradients) < 1e-12


@pytest.mark.parametrize("dtype", HALF)
def test_denoising_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in images(2))
    assert torch.equal(denoising(a, b, weight=0.3), denoising(a.float(), b.float(), weight=0.3))
    assert denoising(a, b).dtype == torch.float32


def test_denoising_numerical_gradient() -> None:
    a, b = normal(4).requires_grad_(), normal(4, seed=1)
    assert torch.autograd.gradcheck(lambda x: denoising(x, b, weight=0.3), (a,))


# --- stationary points under exact scores


def quadrature() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points z, e [9, 1] and weights [9, 1] that integrate polynomials of degree 5 in two standard normals exactly."""
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    z, e = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), e.reshape(-1, 1), torch.outer(weights, weights).reshape(-1, 1)


def gaussian(mean: float, std: float) -> GaussianMixture:
    args = ([[mean]], [std**2], [1.0])
    return GaussianMixture(*(torch.tensor(x, dtype=torch.float64) for x in args), PROCESS)


def generator_gradient(mean: float, std: float, t: int) -> tuple[float, float]:
    """Exact d(loss)/d(mean, std) of the one-step generator f(z) = mean + std z against N(0.5, 0.8^2), by VSD."""
    z, e, w = quadrature()
    parameters = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    x = parameters[0] + parameters[1] * z
    times = torch.full((len(z),), t)
    with torch.no_grad():
        x_t = PROCESS.add_noise(x, e, times)
        real, fake = gaussian(0.5, 0.8)(x_t, times), gaussian(mean, std)(x_t, times)
        gradient = variational_score_gradient(real.eps, fake.eps, weight=real.sigma.square())
    (got,) = torch.autograd.grad((w * pseudo_target(x, gradient)).sum(), parameters)
    return got[0].item(), got[1].item()


@pytest.mark.parametrize("t", [20, 500, 980])
def test_vsd_with_exact_gaussian_scores_is_the_closed_form(t: int) -> None:
    """E[G] = s^3 a (mean - m) / V and E[G z] = s^3 a std (1/V - 1/V_f), with V = a^2 v + s^2."""
    mean, std = 1.2, 0.5
    a, s = PROCESS.alpha(torch.tensor(t)).item(), PROCESS.sigma(torch.tensor(t)).item()
    real, fake = a**2 * 0.8**2 + s**2, a**2 * std**2 + s**2
    got = generator_gradient(mean, std, t)
    assert got[0] == pytest.approx(s**3 * a * (mean - 0.5) / real, rel=1e-9)
    assert got[1] == pytest.approx(s**3 * a * std * (1 / real - 1 / fake), rel=1e-9)


@pytest.mark.parametrize("t", [20, 500, 980])
def test_vsd_vanishes_at_the_optimal_generator_and_points_towards_it(t: int) -> None:
    assert max(map(abs, generator_gradient(0.5, 0.8, t))) < 1e-12
    for mean, std in ((1.5, 0.8), (-1.0, 0.8), (0.5, 0.4), (0.5, 2.0)):
        on_mean, on_std = generator_gradient(mean, std, t)
        assert on_mean * (mean - 0.5) > 0 or mean == 0.5
        assert on_std * (std - 0.8) > 0 or std == 0.8


def test_dmd_vanishes_for_an_optimal_generator_of_a_mixture() -> None:
    """The same law written with other components: its exact scores, and so both gradients, agree to rounding."""
    ring = GaussianMixture.ring(PROCESS)
    index = torch.tensor([0, 0, *range(1, 8)])
    weights = torch.tensor([0.3, 0.7, *[1.0] * 7], dtype=torch.float64)
    same = GaussianMixture(ring.means[index], ring.variances[index], weights, PROCESS)
    x = ring.sample(64, torch.Generator().manual_seed(0))
    t = torch.arange(20, 980, 15)
    x_t = PROCESS.add_noise(x, normal(64, 2), t)
    real, fake = ring(x_t, t), same(x_t, t)
    assert distribution_matching_gradient(x, real.x0, fake.x0).abs().max() < 1e-10
    assert variational_score_gradient(real.eps, fake.eps).abs().max() < 1e-10


def test_dmd_has_the_sign_of_the_error_of_the_mean() -> None:
    z, e, w = quadrature()
    for mean in (-2.0, 0.4, 0.6, 3.0):
        for t in (20, 500, 980):
            x, times = mean + 0.8 * z, torch.full((9,), t)
            x_t = PROCESS.add_noise(x, e, times)
            gradient = distribution_matching_gradient(x, gaussian(0.5, 0.8)(x_t, times).x0, gaussian(mean, 0.8)(x_t, times).x0)
            assert (w * gradient).sum() * (mean - 0.5) > 0


# --- SiD


def affine_gaussian(mean: float, variance: float, a: float, s: float) -> tuple[float, float]:
    """The posterior mean of N(mean, variance) at x_t = a x + s eps as gain and shift: gain x_t + shift."""
    total = a**2 * variance + s**2
    return a * variance / total, s**2 * mean / total


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sid_with_the_optimal_fake_score_is_one_minus_alpha_times_fisher(alpha: float) -> None:
    """E[(m_r - m_f)(m_r - x)] = E|m_r - m_f|^2, as x - m_f is orthogonal to every function of x_t (Tweedie)."""
    mean, std, a, s = 1.2, 0.5, 0.8, 0.6
    z, e, w = quadrature()
    x = mean + std * z
    x_t = a * x + s * e
    (gr, br), (gf, bf) = affine_gaussian(0.5, 0.64, a, s), affine_gaussian(mean, std**2, a, s)
    real, fake = gr * x_t + br, gf * x_t + bf
    assert (w * (x - fake)).sum().abs() < 1e-14
    assert (w * (x - fake) * x_t).sum().abs() < 1e-14
    value = score_identity(x, real, fake, alpha=alpha) * (x - real).abs()  # without the normaliser
    fisher = (w * (real - fake).square()).sum().item()
    assert fisher > 1e-2
    assert (w * value).sum().item() == pytest.approx((1 - alpha) * fisher, abs=1e-13)


def test_sid_is_differentiated_through_both_networks_and_not_through_the_normaliser() -> None:
    """Under no_grad the gradient would be -(m_r - m_f) / W: another algorithm, without an error."""
    a, s = 0.8, 0.6
    (gr, br), (gf, bf) = affine_gaussian(0.5, 0.64, a, s), affine_gaussian(1.2, 0.25, a, s)
    x, e = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    x_t = a * x + s * e
    real, fake, alpha = gr * x_t + br, gf * x_t + bf, 1.2
    (got,) = torch.autograd.grad(score_identity(x, real, fake, alpha=alpha).sum(), x)
    d, w = (real - fake).detach(), (x - real).detach().abs().mean(dim=1, keepdim=True)
    rest = (real - x).detach() - alpha * d
    slope = a * (gr - gf)
    torch.testing.assert_close(got, (slope * rest + d * (a * gr - 1 - alpha * slope)) / w, rtol=1e-10, atol=1e-12)
    direct = torch.autograd.grad(score_identity(x, real.detach(), fake.detach(), alpha=alpha).sum(), x)[0]
    torch.testing.assert_close(direct, -d / w, rtol=1e-10, atol=1e-12)
    assert (got - direct).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_at_rest_when_both_networks_are_one_function(alpha: float) -> None:
    x, e = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    gain, shift = affine_gaussian(0.5, 0.64, 0.8, 0.6)
    real, fake = (gain * (0.8 * x + 0.6 * e) + shift for _ in range(2))
    loss = score_identity(x, real, fake, alpha=alpha)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.abs().max() == 0
    assert gradient.abs().max() < 1e-10


def test_sid_closed_form_and_floor_per_sample() -> None:
    x, real, fake = images(3)
    got = score_identity(x, real, fake, alpha=0.7)
    for i in range(3):
        d = real[i] - fake[i]
        want = d * (real[i] - x[i] - 0.7 * d) / (x[i] - real[i]).abs().mean()
        torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-13)
    assert score_identity(x, x.clone(), fake, floor=0.5).isfinite().all()


# --- f-distill


def test_f_distill_with_the_reverse_kl_is_dmd() -> None:
    inputs = images(3, torch.float32)
    weight = f_divergence_weight(torch.tensor([-5.0, 0.3, 9.0]), kind="reverse_kl")
    assert (weight - 1).abs().max() < 1e-6
    gradient = distribution_matching_gradient(*inputs)
    torch.testing.assert_close(weight[:, None, None, None] * gradient, gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_f_distill_weight_makes_the_score_difference_the_gradient_of_its_divergence(kind: str) -> None:
    """d/dm D_f(N(0, 1) || N(m, 1)) = -E_q[h(r) (score_p - score_q)] by quadrature on a grid, for x = m + z."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    m = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_p, log_q = -0.5 * grid.square(), -0.5 * (grid - m).square()
    q = log_q.exp() / (2 * torch.pi) ** 0.5
    divergence = torch.trapezoid(q * f_generator((log_p - log_q).exp(), kind=kind)[0], grid)
    (want,) = torch.autograd.grad(divergence, m)
    weight = f_divergence_weight(log_p - log_q, kind=kind, low=1e-6, high=1e6)
    got = -torch.trapezoid(q * weight * (-grid + (grid - m)), grid)
    assert want.item() > 0.1
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_f_distill_weights_at_equal_laws_and_at_the_clip() -> None:
    one = {kind: f_divergence_weight(torch.zeros(1).double(), kind=kind).item() for kind in F_DIVERGENCES}
    assert one.pop("jeffreys") == pytest.approx(2)
    assert [one.pop(kind) for kind in ("jensen_shannon", "softened_reverse_kl")] == [0.5, 0.5]
    assert set(one.values()) == {1.0}
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    torch.testing.assert_close(f_divergence_weight(far, kind="forward_kl"), torch.tensor([0.1, 20.0], dtype=torch.float64))
    halved = f_divergence_weight(torch.zeros(1), kind="forward_kl", typical=torch.tensor([2.0]))
    assert halved.item() == 0.5


def test_f_distill_weight_gives_the_discriminator_no_gradient() -> None:
    logit = torch.zeros(2, requires_grad=True)
    assert not f_divergence_weight(logit, kind="forward_kl").requires_grad
    with pytest.raises(ValueError, match="jensen_shannon"):
        f_divergence_weight(logit, kind="js")


# --- TDM


def test_tdm_importance_is_one_for_equal_noises_and_the_exponential_of_a_difference_of_means() -> None:
    mixed, fresh = normal(2, 3, 4, 5, 6)
    assert torch.equal(trajectory_importance(fresh, fresh), torch.ones(3).double())
    want = (-mixed.square().mean(dim=(1, 2, 3)) / 2).exp() / (-fresh.square().mean(dim=(1, 2, 3)) / 2).exp()
    torch.testing.assert_close(trajectory_importance(mixed, fresh), want, rtol=1e-12, atol=0)


def test_tdm_importance_stays_near_one_at_any_size() -> None:
    """Sums in place of means make it e^(+-100) for a 64 x 64 latent: one sample is the batch."""
    for size in (4, 64):
        weight = trajectory_importance(normal(16, 4, size, size), normal(16, 4, size, size, seed=1))
        assert ((weight > 0.5) & (weight < 2)).all()


def test_tdm_mixed_noise_of_independent_noises_has_unit_variance() -> None:
    """((a_t / a_m) s_m eps + beta e) / s_t with beta^2 = s_t^2 - (a_t / a_m)^2 s_m^2 has the law of fresh noise."""
    a_m, s_m, a_t, s_t = 0.9, 0.19**0.5, 0.6, 0.8
    beta = (s_t**2 - (a_t / a_m * s_m) ** 2) ** 0.5
    z, e, w = quadrature()
    mixed = (a_t / a_m * s_m * z + beta * e) / s_t
    assert (w * mixed.square()).sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("c", "rtol"), [(1e-7, 1e-9), (1e6, 1e-9)])
def test_tdm_gradient_is_the_sign_of_dmd_for_small_c_and_dmd_over_c_for_large(c: float, rtol: float) -> None:
    x, real, fake = images(3)
    x.requires_grad_()
    (got,) = torch.autograd.grad(trajectory_matching(x, real, fake, c=c).sum(), x)
    dmd = distribution_matching_gradient(x.detach(), real, fake)
    normaliser = (x.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    want = dmd / c if c > 1 else dmd.sign() / normaliser
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)


def test_tdm_is_the_pseudo_huber_to_the_papers_target_and_stops_at_scores_and_normaliser() -> None:
    x, real, fake = (v.requires_grad_() for v in images(3))
    loss = trajectory_matching(x, real, fake, c=0.1)
    normaliser = (x - real).detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    want = pseudo_huber(x, (x + real - fake).detach(), c=0.1) / normaliser
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(loss.sum(), (x, real, fake), allow_unused=True)
    torch.testing.assert_close(got[0], torch.autograd.grad(want.sum(), x)[0], rtol=1e-9, atol=1e-12)
    assert got[1] is None
    assert got[2] is None


def test_tdm_and_f_distill_are_at_rest_at_the_teachers_law_and_pull_back_a_shifted_one() -> None:
    """Exact posterior means of the teacher's N(0.5, 0.8^2) and of the generator's own law, written in two ways."""
    a, s, e = 0.8, 0.6, normal(64, 4, seed=1)
    for shift in (0.0, 0.3):
        x = (0.5 + shift + 0.8 * normal(64, 4)).requires_grad_()
        x_t = (a * x + s * e).detach()
        gain, offset = affine_gaussian(0.5, 0.64, a, s)
        real = gain * x_t + offset
        precision = 1 / 0.64 + (a / s) ** 2
        fake = ((0.5 + shift) / 0.64 + a / s**2 * x_t) / precision
        (gradient,) = torch.autograd.grad(trajectory_matching(x, real, fake).sum(), x)
        dmd = distribution_matching_gradient(x.detach(), real, fake)
        weights = [f_divergence_weight(normal(64, 1, seed=2), kind=kind) for kind in F_DIVERGENCES]
        largest = max(g.abs().max().item() for g in (gradient, *(weight * dmd for weight in weights)))
        if shift == 0:
            assert largest < 1e-10
        else:  # the means are 0.3 too high: every gradient points down the axis of every sample
            assert (gradient > 1e-3).all()
            assert all((weight * dmd > 1e-6).all() for weight in weights)


@pytest.mark.parametrize("dtype", HALF)
def test_the_later_losses_in_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, real, fake = (v.to(dtype) for v in images(3))
    wide = [v.float() for v in (x, real, fake)]
    for half, full in (
        (score_identity(x, real, fake), score_identity(*wide)),
        (trajectory_matching(x, real, fake), trajectory_matching(*wide)),
        (trajectory_importance(x, real), trajectory_importance(*wide[:2])),
        (f_divergence_weight(x, kind="jeffreys"), f_divergence_weight(wide[0], kind="jeffreys")),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_the_later_losses_ignore_other_samples() -> None:
    x, real, fake = images(3)
    order = torch.tensor([2, 0])
    for loss in (score_identity, trajectory_matching):
        assert torch.equal(loss(x, real, fake)[order], loss(x[order], real[order], fake[order]))
    assert torch.equal(trajectory_importance(x, real)[order], trajectory_importance(x[order], real[order]))


def test_one_weight_a_sample_meets_its_sample_also_where_batch_and_width_are_equal() -> None:
    """Matched from the right, [B] would weight columns without an error whenever B equals the last axis; float64 would widen."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2))
    weight = torch.arange(8, dtype=torch.float64)
    for function, plain in (
        (denoising, (a - b).square()),
        (score_distillation_gradient, a - b),
        (variational_score_gradient, a - b),
    ):
        got = function(a, b, weight=weight)
        assert got.dtype == torch.float32
        assert torch.equal(got, weight.float().reshape(8, 1, 1, 1) * plain)
