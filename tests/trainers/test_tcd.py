"""TCD: where its jumps end, its loss at both extremes and for an exact student, its sampler's limits, what its folder is told."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, TCDScheduler
from short_runs import program, shake, started, trainer
from tiny import tiny_flow_teacher, tiny_teacher
from torch import Tensor

from fastdiff.cli.sample import check_student
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess, RectifiedFlow
from fastdiff.diffusion.renoising import consistency_step, tcd_step
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import LCM, TCD, _latent
from fastdiff.trainers._segments import sample_tcd, segment_around, segment_edges
from fastdiff.trainers.method import Method
from fastdiff.trainers.trajectory import own_generators, trajectory

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "range-4-steps": TCD(guidance_range=(2.0, 4.0), sample_guidance_scale=2.5, decay=0.5, **PAIRS),
    "one-scale-eta-1": TCD(
        guidance_range=(2.0, 2.0), steps=2, original_steps=20, distance="squared", lr=1e-3, huber_c=0.1, eta=1.0, **PAIRS
    ),
}
OFF = {"guidance_range": (1.0, 1.0), "pair_guidance_scale": 1.0, "distance": "squared"}


# --- ends and jumps


@pytest.mark.parametrize("k", [1, 2, 4, 8, 40])
def test_an_edge_is_strictly_below_its_time_and_starts_the_segment_above_it(k: int) -> None:
    edges, tops = segment_around(torch.arange(40), 40, k)
    t = 25 * torch.arange(1, 41) - 1
    assert (edges < t).all()
    assert (t <= tops).all()
    assert ((tops - edges == 1000 // k) | (edges == 0)).all()
    assert sorted(set(edges.tolist())) == [max(25 * e - 1, 0) for e in segment_edges(40, k)[:-1]]
    at_an_edge = torch.tensor([e - 1 for e in segment_edges(40, k)[1:]])  # t_n is an edge itself: of the segment that it ends
    assert segment_around(at_an_edge, 40, k)[0].tolist() == sorted(set(edges.tolist()))


def test_an_end_is_uniform_from_the_edge_to_the_lower_time_both_included(tmp_path: Path) -> None:
    with started(TCD(original_steps=10, **PAIRS), tmp_path, batch_size=4000) as run:
        batch = run._micro_batches(0)[0]
        level, lower, edge = run.method.neighbours(batch.draws.integers("n", 0, 10))
        end = run.method.end(batch, lower, edge)
    assert (edge == 0).all()
    assert (end <= lower).all()
    assert (end >= 0).all()
    first = end[level == 99]
    assert (first == 0).all()  # nothing lies between u = 0 and the edge
    second = end[level == 199]
    assert second.min() == 0
    assert 95 < second.max() <= 99
    assert abs(second.double().mean() - 49.5) < 4 * 29 / len(second) ** 0.5


@pytest.mark.parametrize("process", [laws.process(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_a_jump_to_its_own_time_stays_where_it_is(process: NoiseProcess) -> None:
    x, guess = (torch.randn(8, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    for level in (20, 500, 990):
        t = process.at_level(torch.full((8,), level))
        assert (TCD().compared(Prediction(x, t, guess, process), t) - x).abs().max() < 1e-12


# --- the loss


def clean_process() -> DiscreteVP:
    """Stable Diffusion's table, but for a first row without noise to the last digit."""
    table = laws.process().alphas_cumprod.clone()  # type: ignore[attr-defined]
    table[0] = 1 - 1e-15
    return DiscreteVP(table)


def test_with_all_ends_at_the_clean_end_the_loss_is_lcm_s(tmp_path: Path) -> None:
    teacher = Teacher.from_module(TimeMLP(3), clean_process(), "v_prediction", shape=(3,))
    losses = []
    for method in (LCM(**OFF, **PAIRS), TCD(**OFF, **PAIRS)):
        with started(method, tmp_path / method.name(), teacher, batch_size=64) as run:
            shake(run)
            batch = run._micro_batches(0)[0]
            batch.draws.uniform = lambda name: torch.zeros(64, dtype=torch.float64)  # t_end = 0
            losses.append(method.loss("student", batch, run._roles)["consistency"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 1e-4


def test_with_the_end_at_the_lower_time_it_is_regression_on_the_teacher_s_step(tmp_path: Path) -> None:
    """The target is x_u itself, so the teacher's own network has no loss, and another student the distance of its step from it."""
    with started(TCD(**OFF, **PAIRS), tmp_path, batch_size=32) as run:
        batch = run._micro_batches(0)[0]
        batch.draws.uniform = lambda name: torch.full((32,), 1 - 1e-9, dtype=torch.float64)  # t_end = u
        assert run.method.loss("student", batch, run._roles)["consistency"].item() < 1e-11
        shake(run)
        got = run.method.loss("student", batch, run._roles)["consistency"].item()
        _, x0, cond = run.method.draw_pairs(batch)
        t = 20 * (batch.draws.integers("n", 0, 50) + 1) - 1
        x_t = run.teacher.process.add_noise(x0, batch.noise("eps"), t)
        steps = [ddim_step(run._roles.denoiser(name)(x_t, t, cond), (t - 20).clamp(min=0)) for name in ("student", "teacher")]
    assert got == pytest.approx((steps[0] - steps[1]).square().mean().item(), rel=1e-4)
    assert got > 1e-7


class Landing(Denoiser):
    """Its DDIM jump from (x_t, t) to the batch's own end lands where the exact trajectory is."""

    def __init__(self, law: Gaussian) -> None:
        super().__init__(lambda x_t, t, cond: x_t, law.process, "sample")
        self.law = law
        self.end = torch.zeros(0)

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        (a_t, s_t), (a_e, s_e) = ((self.process.alpha(v)[:, None], self.process.sigma(v)[:, None]) for v in (t, self.end))
        gap = a_e - a_t * s_e / s_t
        x0 = (self.law.flow_map(x_t, t, self.end) - s_e / s_t * x_t) / torch.where(gap == 0, 1, gap)
        return Prediction(x_t, t, x0, self.process)


@pytest.mark.parametrize("process", [laws.process(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_a_student_that_knew_its_end_could_have_no_loss(
    process: NoiseProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CTM's does; the best x0 for one end is not that for another."""
    law = Gaussian.anisotropic(process, d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    method, exact = TCD(**OFF, pairs=200, pair_steps=2), Landing(law)
    monkeypatch.setattr(_latent, "ddim_step", lambda p, u: law.flow_map(p.x_t, p.t, u))
    with started(method, tmp_path, teacher, batch_size=200) as run:
        run._roles.denoiser = lambda name, own=run._roles.denoiser: own(name) if name == "teacher" else exact
        batch = run._micro_batches(0)[0]
        batch.draws.normal = lambda name, shape, own=batch.draws.normal: own(name, shape).double()
        _, lower, edge = method.neighbours(batch.draws.integers("n", 0, 50))
        exact.end = method.end(batch, lower, edge)
        assert abs(method.loss("student", batch, run._roles)["consistency"].item()) < 1e-9
        exact.end = process.at_level(torch.zeros(200, dtype=torch.long))
        assert method.loss("student", batch, run._roles)["consistency"].item() > 1e-5


class Linear(Denoiser):
    """x0 = c_n x_t at the n-th time."""

    def __init__(self, c: Tensor, process: NoiseProcess) -> None:
        super().__init__(lambda x_t, t, cond: x_t, process, "sample")
        self.c = c

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        return Prediction(x_t, t, self.c[((t + 1) // 25 - 1).clamp(min=0)][:, None] * x_t, self.process)


@pytest.mark.parametrize("k", [1, 4])
def test_at_the_fixed_point_worked_out_by_hand_the_loss_is_at_rest(k: int, tmp_path: Path) -> None:
    """But for which ends were drawn; and not where neighbours are a twentieth away from it, to either side."""
    fixed = program("trajectory_fixed_point").fixed_point(0.3, 40, k, None)
    law = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 0.3, dtype=torch.float64), laws.process())
    teacher = Teacher.from_module(TimeMLP(1), law.process, "sample", shape=(1,), law=law)
    method = TCD(**OFF, original_steps=40, pairs=200, pair_steps=2)
    method.segments_at = lambda step: k  # type: ignore[method-assign]
    sizes = []
    with started(method, tmp_path, teacher, batch_size=40_000) as run:
        for off in (0.0, 0.05):
            exact = torch.tensor([fixed[25 * n + 24] * (1 + off * (-1) ** n) for n in range(40)], dtype=torch.float64)
            c = exact.requires_grad_()
            student, own = Linear(c, law.process), run._roles.denoiser("teacher")
            run._roles.denoiser = lambda name, own=own, student=student: own if name == "teacher" else student
            method.loss("student", run._micro_batches(0)[0], run._roles)["consistency"].backward()
            sizes.append(c.grad[1:].abs())
    assert (sizes[0] < 0.2 * sizes[1]).double().mean() > 0.9
    assert sizes[0].sum() < 0.1 * sizes[1].sum()


def test_neither_target_nor_teacher_has_a_part_in_the_gradient(tmp_path: Path) -> None:
    with started(TCD(**PAIRS), tmp_path) as run:
        shake(run)
        own = [p for name in ("student", "target") for p in run._roles.modules[name].parameters()]
        for p in [*own, *run.teacher.family.backbone.parameters()]:
            p.requires_grad_(True)
        run.method.loss("student", run._micro_batches(0)[0], run._roles)["consistency"].backward()
        assert all(p.grad is not None for p in run._roles.modules["student"].parameters())
        assert all(p.grad is None for p in [*run._roles.modules["target"].parameters(), *run.teacher.family.backbone.parameters()])
        run.teacher.family.backbone.requires_grad_(False)


# --- sampling


def test_eta_0_samples_as_ddim_and_eta_1_as_lcm() -> None:
    process, law = laws.process(), Gaussian.anisotropic(laws.process(), d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    z, fresh = (torch.randn(20_000, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    row = torch.zeros(20_000, dtype=torch.long)
    ddim = ddim_step(trajectory(teacher.denoiser, z, None, [999, 499], "ddim")[-1], row)
    assert torch.equal(sample_tcd(teacher.denoiser, z, None, [999, 499], 0.0), ddim)
    first, u = teacher.denoiser(z, row + 999, None), row + 499
    tcd = trajectory(teacher.denoiser, z, None, [999, 499], "tcd", lambda step: fresh, eta=1.0)[1].x_t
    lcm = consistency_step(first, u, fresh)
    assert 1e-3 * lcm.norm() < (tcd - lcm).norm() < 0.02 * lcm.norm()  # abar_0 is 0.9991, not 1


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_after_a_step_of_any_eta_the_noise_has_the_variance_of_its_time(eta: float) -> None:
    """Of old and of fresh noise, 1 - abar_prev in sum, where x0 is right."""
    process, zero = laws.process(), torch.zeros(1, 1, dtype=torch.float64)
    one, t, u = zero + 1, torch.tensor([999]), torch.tensor([499])
    parts = []
    for old, fresh in ((one, zero), (zero, one)):
        prediction = Prediction(process.sigma(t)[:, None] * old, t, zero, process)
        parts.append(tcd_step(prediction, u, fresh, eta).square())
    assert (parts[0] + parts[1]).item() == pytest.approx(1 - process.alphas_cumprod[499].item(), rel=1e-12)  # type: ignore[attr-defined]
    assert (parts[1].item() > 0) == (eta > 0)


def test_what_plain_diffusers_does_unasked_and_told(tmp_path: Path) -> None:
    """eta is no part of a folder: 50 steps without noise by a bare call; the LCM pipeline class cannot run the scheduler at all."""
    method = TCD(guidance_range=(2.0, 2.0), lr=1e-2, **PAIRS)
    run = trainer(method, tmp_path, max_steps=3, warmup_steps=0)
    run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, TCDScheduler)
    assert not any("eta" in key and "beta" not in key for key in pipeline.scheduler.config)
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    prompts, noise, _ = run.samples
    prompts, noise = prompts[:2], noise[:2]

    def draw(**call: object) -> Tensor:
        return pipeline(prompts, latents=noise, generator=own_generators(2), output_type="pt", **call).images

    without = draw()
    assert calls == [2] * 50  # of batch 2: no unconditional pass
    assert torch.equal(without, draw(num_inference_steps=50, eta=0.0))
    assert (draw(num_inference_steps=4) - draw(num_inference_steps=4, eta=0.3)).abs().max() > 1e-4
    student = Denoiser(run.teacher.family.network(pipeline.unet), run.teacher.process, run.teacher.prediction_type)
    for steps, eta in ((1, 0.3), (2, 0.0), (8, 0.7)):  # other ways than the trained one
        other = TCD(guidance_range=(2.0, 2.0), steps=steps, eta=eta)
        with torch.no_grad():
            latents = other.sample(student, noise, run.teacher.encode(prompts), own_generators(2))
        assert (draw(num_inference_steps=steps, eta=eta) - run.teacher.decode(latents)).abs().max() < 1e-5
    consistency = LatentConsistencyModelPipeline(**pipeline.components)
    consistency.set_progress_bar_config(disable=True)
    with pytest.raises(TypeError, match="NoneType"):
        consistency(prompts)
    check_student(str(tmp_path), 8)  # any number of steps of the grid
    assert '"eta": 0.3' in (tmp_path / "fastdiff.json").read_text()
    assert "num_inference_steps=4, eta=0.3" in (tmp_path / "README.md").read_text()


def test_a_flow_teacher_s_scheduler_makes_eta_0_and_eta_1(tmp_path: Path) -> None:
    method = TCD(guidance_range=(2.0, 2.0), eta=1.0, original_steps=40, **PAIRS)
    run = trainer(method, tmp_path, tiny_flow_teacher(), max_steps=2)
    run.train()
    assert run.result["export_max_abs_diff"] < 1e-5
    for eta, stochastic in ((0.0, False), (1.0, True)):
        scheduler = TCD(eta=eta, guidance_range=(2.0, 2.0), original_steps=40).schedule(run.teacher).parts(run.teacher)[1]
        assert scheduler.config.stochastic_sampling == stochastic
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_what_no_scheduler_does_is_refused(tmp_path: Path) -> None:
    method = TCD(guidance_range=(2.0, 2.0), original_steps=40, **PAIRS)
    with pytest.raises(UserError, match="eta=0 or eta=1"), started(method, tmp_path, tiny_flow_teacher()):
        pass
    with pytest.raises(UserError, match="eta is 1"):
        TCD(eta=1.5)
    with started(TCD(**PAIRS), tmp_path / "vp", tiny_teacher()) as run:
        assert run.method.schedule(run.teacher).eta == 0.3
