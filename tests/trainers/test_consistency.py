"""CD, CT, iCT and ECT: the exact consistency function has no loss, the boundary, the two passes, times and curricula."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import listening, shake, started
from torch import Tensor, nn

from fastdiff.data.pairs import Pairs
from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.law import LawDenoiser
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import Consistency
from fastdiff.trainers._consistency import (
    Interval,
    easy_interval,
    falling_grid,
    finite_ratios,
    grid_interval,
    two_passes,
    with_boundary,
)
from fastdiff.trainers._plan import plan
from fastdiff.trainers.config import Config
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Calls, Method

PAIRS: dict[str, Any] = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "cd": Consistency(guidance_scale=2.0, dropout=True, target_decay=0.5, **PAIRS),
    "ict": Consistency(kind="ict", curriculum=(4, 8), curriculum_steps=8, huber_c=0.1, **PAIRS),
    "ect": Consistency(kind="ect", curriculum_steps=8, stages=4, truncation=1.0, truncation_start=2, **PAIRS),
}
N, D = 64, 4
PROCESSES = {"edm": EDM(), "vp": laws.process(), "flow": RectifiedFlow(), "trigflow": TrigFlow()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


# --- a Gaussian, whose consistency function is known


class Exact(Denoiser):
    """The end of the exact trajectory at the lowest level, as x0; ``scale`` makes it wrong."""

    def __init__(self, law: Gaussian, scale: Tensor | float = 1.0) -> None:
        super().__init__(lambda x, t, cond: x, law.process, "sample")
        self.law, self.scale = law, scale

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        lowest = self.process.at_level(torch.tensor(0))
        end = self.law.flow_map(x_t, t, lowest.expand(len(x_t))) / self.process.alpha(lowest)
        return Prediction(x_t, t, self.scale * end, self.process)


class Fixed(Denoiser):
    """The same x0 for everything."""

    def __init__(self, x0: Tensor, process: NoiseProcess) -> None:
        super().__init__(lambda x, t, cond: x0, process, "sample")


class ExactRoles:
    """In the place of ``Roles``."""

    def __init__(self, teacher: Teacher, /, **denoisers: Denoiser) -> None:
        self.teacher, self.denoisers = teacher, denoisers

    def denoiser(self, name: str) -> Denoiser:
        return self.denoisers[name]


class Double(Draws):
    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).double()


class ExactSteps(Consistency):
    """CD whose teacher follows the law's flow without error."""

    def teacher_step(self, x_t: Tensor, at: Interval, cond: Any, batch: Batch, roles: Any) -> Tensor:
        return roles.teacher.law.flow_map(x_t, at.t, at.r)


def gaussian(process: NoiseProcess) -> tuple[Batch, Gaussian]:
    law = Gaussian.anisotropic(process, d=D)
    teacher = Teacher.from_module(nn.Linear(1, 1), process, "sample", shape=(D,), law=law)
    return Batch(Double(0, 0, 0, size=N, part=slice(N)), PromptTable([""], teacher), teacher), law


def with_data(method: Consistency, law: Gaussian) -> Consistency:
    """The method with exact samples of the law for its stored results."""
    x0 = law.sample(500, torch.Generator().manual_seed(1))
    method._pairs = Pairs(torch.zeros(500, D), x0, torch.zeros(500, dtype=torch.long))
    return method


def exact_loss(method: Consistency, process: NoiseProcess, scale: float = 1.0) -> float:
    """The loss of the exact consistency function, times ``scale``, with the law as the teacher."""
    batch, law = gaussian(process)
    f = Exact(law, scale)
    roles = ExactRoles(batch.teacher, student=f, target=f, teacher=LawDenoiser(law))
    return with_data(method, law).loss("student", batch, roles)["consistency"].item()  # type: ignore[arg-type]


@each_process
def test_the_exact_consistency_function_has_no_loss_on_exact_steps(process: NoiseProcess) -> None:
    assert exact_loss(ExactSteps(guidance_scale=1.0), process) < 1e-18
    assert exact_loss(ExactSteps(guidance_scale=1.0), process, scale=1.1) > 1e-6  # only the boundary knows the scale


@pytest.mark.parametrize(("solver", "order"), [("heun", 3), ("ddim", 2)])
def test_finer_grids_have_the_same_limit(solver: Any, order: int) -> None:
    """A step of the teacher is wrong by h^3 (Heun) or h^2 (DDIM): halving h divides the squared distance by 64 or 16."""
    found = [exact_loss(Consistency(guidance_scale=1.0, solver=solver, grid_size=n), EDM()) for n in (161, 321)]
    assert found[0] / found[1] == pytest.approx(4**order, rel=0.25)


@pytest.mark.parametrize("process", [EDM(), laws.process()], ids=["edm", "vp"])
def test_ct_is_cd_with_the_sample_itself_as_the_teacher(process: NoiseProcess) -> None:
    batch, law = gaussian(process)
    f = Exact(law, 1.3)
    distilled = with_data(Consistency(guidance_scale=1.0, solver="ddim", grid_size=17), law)
    x0 = distilled.draw_pairs(batch)[1]
    roles = ExactRoles(batch.teacher, student=f, target=f, teacher=Fixed(x0, process))
    losses = [
        method.loss("student", batch, roles)["consistency"].item()  # type: ignore[arg-type]
        for method in (distilled, with_data(Consistency(kind="ct", curriculum=(17, 17)), law))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] > 1e-4


def test_ict_and_ect_are_the_norm_of_a_sample_over_the_difference_of_noise_to_signal_ratios() -> None:
    for kind, c in (("ict", 0.00054 * D**0.5), ("ect", 0.0)):
        method = Consistency(kind=kind, curriculum_steps=8, stages=4)  # type: ignore[arg-type]
        batch, law = gaussian(laws.process())
        batch.draws.key = (0, 0, 3)
        f, process = Exact(law, 1.3), law.process
        loss = with_data(method, law).loss("student", batch, ExactRoles(batch.teacher, student=f))["consistency"]  # type: ignore[arg-type]
        _, x0, cond = method.draw_pairs(batch)
        at, eps = method.interval(batch), batch.noise("eps")
        ahead = f(process.add_noise(x0, eps, at.t), at.t, cond).x0
        behind = f(process.add_noise(x0, eps, at.r), at.r, cond).x0
        if kind == "ect":
            assert 0 < (at.rho_r == 0).sum() < N
            behind[at.rho_r == 0] = x0[at.rho_r == 0]
        else:
            last = at.r == 0
            behind[last] = (process.add_noise(x0, eps, at.r) / process.alpha(at.r)[:, None])[last]
        gap = process.nsr(at.t) - torch.where(at.rho_r == 0, 0, process.nsr(at.r))
        want = (((ahead - behind).square().sum(1) + c**2).sqrt() - c) / gap
        assert loss.item() == pytest.approx(want.mean().item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["cd", "ct", "ict", "ect"])
def test_the_target_is_a_constant_also_where_it_is_the_student(kind: Any) -> None:
    """A student that may move its target too finds that the same answer everywhere is consistent."""
    batch, law = gaussian(laws.process())
    batch.draws.key = (0, 0, 3)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    method = with_data(Consistency(kind=kind, guidance_scale=1.0, curriculum=(8, 8), curriculum_steps=8, stages=4), law)

    def gradient(target: float | Tensor) -> Tensor:
        """By the scale of the student; the target's own is kept apart."""
        pass_of = [Exact(law, scale), Exact(law, target)]
        roles = ExactRoles(batch.teacher, teacher=LawDenoiser(law), student=pass_of[0], target=pass_of[1])
        if kind in {"ict", "ect"}:
            roles.denoiser = lambda name: pass_of.pop(0)  # type: ignore[method-assign]
        return torch.autograd.grad(method.loss("student", batch, roles)["consistency"], scale)[0]  # type: ignore[arg-type]

    assert torch.equal(gradient(scale), gradient(1.3))
    assert gradient(scale).abs() > 1e-3


# --- boundary


@each_process
def test_the_boundary_is_exact_to_the_bit_and_at_the_lowest_level_alone(process: NoiseProcess) -> None:
    x, garbage = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.full((3, 5), torch.nan)
    t = process.at_level(torch.tensor([0, 1, 999]))
    f = with_boundary(Prediction(x, t, garbage, process))
    assert torch.equal(f[0], x[0] / process.alpha(t)[0].float())
    assert f[1:].isnan().all()
    if isinstance(process, EDM):
        assert torch.equal(f[0], x[0])


# --- times


@each_process
def test_a_grid_falls_through_all_levels_of_a_process(process: NoiseProcess) -> None:
    for n in (2, 18, 1281):
        grid = falling_grid(process, n)
        assert (grid.diff() < 0).all()
        assert torch.equal(grid[[0, -1]], process.at_level(torch.tensor([999, 0])))
        assert len(grid) == (1000 if n == 1281 and not grid.is_floating_point() else n)
        rho = finite_ratios(process, grid)
        assert (rho.diff() < 0).all()
        assert rho.isfinite().all()  # flow: 1 / infinity would give no weight to the time of one-step sampling


def test_the_grid_of_edm_is_karras() -> None:
    n, low, high = 18, 0.002 ** (1 / 7), 80 ** (1 / 7)
    want = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    torch.testing.assert_close(falling_grid(EDM(), n), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_intervals_come_uniformly_or_by_the_log_normal_law_of_icts_sigma() -> None:
    process, u = EDM(), (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    grid = falling_grid(process, 11)
    even, drawn = grid_interval(process, 11, u), grid_interval(process, 11, u, (-1.1, 2.0))
    cdf = torch.distributions.Normal(-1.1, 2.0).cdf(grid.log())
    for at, want in ((even, torch.full((10,), 0.1)), (drawn, (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1]))):
        share = torch.stack([(at.t == t).double().mean() for t in grid[:-1]])
        torch.testing.assert_close(share, want.double(), atol=2e-5, rtol=0)
        assert torch.equal(at.r, grid[1:][torch.searchsorted(-grid, -at.t)])
        assert torch.equal(at.rho_t, at.t)


@each_process
@pytest.mark.parametrize("stage", [0, 2, 7])
def test_easy_times_are_in_order_and_within_the_process(process: NoiseProcess, stage: int) -> None:
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = (-1.1 + 2 * z).exp()
    at = easy_interval(process, rho, stage, (2.0, 8.0, 1.0))
    low, high = process.at_level(torch.tensor([0, 999]))
    assert low <= at.r.min() <= at.t.max() <= high
    assert (at.rho_t > at.rho_r).all()
    ended = at.rho_r == 0
    assert (at.t > at.r)[~ended].all()
    assert torch.equal(at.rho_r[~ended], process.nsr(at.r[~ended]))
    wanted = at.rho_t * (1 - 2.0 ** -(stage + 1) * (1 + 8 * (-at.rho_t).sigmoid()))
    assert torch.equal(ended, wanted < process.nsr(low))
    if at.t.is_floating_point():
        torch.testing.assert_close(at.rho_r[~ended], wanted[~ended], rtol=1e-9, atol=0)
    assert (ended.double().mean() > 0.75) == (stage == 0)  # the first stage is nearly diffusion training


# --- curricula


def test_curricula_run_over_their_iterations_and_stay_at_the_end() -> None:
    steps = [0, 250, 500, 999, 1000, 5000]
    easy = Consistency(kind="ect", curriculum_steps=1000, stages=4)
    assert [easy.stage_at(step) for step in steps] == [0, 1, 2, 3, 3, 3]
    improved = Consistency(kind="ict", curriculum_steps=800)
    assert [improved.times_at(step) for step in (0, 99, 100, 799, 9999)] == [11, 11, 21, 1281, 1281]
    trained = Consistency(kind="ct", curriculum_steps=1000)
    assert [trained.times_at(step) for step in (0, 1000, 5000)] == [2, 151, 151]
    assert trained.decay_at(0) == pytest.approx(0.95)
    assert trained.decay_at(1000) == pytest.approx(0.95 ** (2 / 151))
    distilled = Consistency()
    assert {distilled.times_at(step) for step in steps} == {18}
    assert [Consistency(target_decay=decay).decay_at(7) for decay in (0.0, 0.7)] == [0.0, 0.7]


def test_curricula_without_a_length_run_over_the_whole_run(tmp_path: Path) -> None:
    with started(Consistency(kind="ect", stages=4, **PAIRS), tmp_path, max_steps=8) as run:
        assert [run.method.stage_at(step) for step in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_target_follows_by_the_decay_of_its_step(tmp_path: Path) -> None:
    method = Consistency(kind="ct", curriculum_steps=4, **PAIRS)
    with started(method, tmp_path, warmup_steps=0) as run:
        roles = run._roles
        for step in range(2):
            before = [p.clone() for p in roles.parameters("target")]
            run.advance()
            decay = method.decay_at(step)
            for old, ahead, now in zip(before, roles.parameters("student"), roles.parameters("target"), strict=True):
                torch.testing.assert_close(now, decay * old + (1 - decay) * ahead)


@pytest.mark.parametrize(("kind", "kept"), [("cd", "AdamW"), ("ct", "AdamW"), ("ict", "RAdam"), ("ect", "RAdam")])
def test_the_optimiser_and_the_target_are_those_of_the_paper(kind: Any, kept: str, tmp_path: Path) -> None:
    with started(Consistency(kind=kind, **PAIRS), tmp_path) as run:
        assert type(run._optimizers["student"].optimizer).__name__ == kept
        assert ("target" in run._roles.specs) == (kept == "AdamW")


# --- the two passes


def test_both_passes_see_the_same_noise_and_sample(tmp_path: Path) -> None:
    with started(Consistency(kind="ct", curriculum=(6, 6), **PAIRS), tmp_path, batch_size=12) as run, listening(run) as calls:
        batch = run._micro_batches(0)[0]
        run.method.loss("student", batch, run._roles)
        process, x0 = run.teacher.process, run.method.draw_pairs(batch)[1]
        at = run.method.interval(batch)
        noise = batch.noise("eps")
        assert [call.role for call in calls] == ["student", "target"]
        for call, t in zip(calls, (at.t, at.r), strict=True):
            torch.testing.assert_close(call.x_t, process.add_noise(x0, noise, t))
            assert torch.equal(call.t, t)
        assert torch.equal(calls[0].cond, calls[1].cond)


class Dropped(nn.Module):
    """A layer with dropout, which remembers its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        kept = self.dropout(torch.ones_like(x_t))
        self.masks.append(kept.detach())
        return kept * self.linear(x_t)


@pytest.mark.parametrize("kind", ["cd", "ict"])
def test_both_passes_drop_the_same(kind: Any, tmp_path: Path) -> None:
    """Another mask in the target is noise that no error reports."""
    teacher = Teacher.from_module(Dropped(), RectifiedFlow(), "flow_prediction", shape=(8,), prompts=["0"])
    with started(Consistency(kind=kind, dropout=True, guidance_scale=1.0, **PAIRS), tmp_path, teacher) as run:
        networks = [run._roles.modules[name] for name in ("student", "target") if name in run._roles.modules]
        for network in networks:
            network.masks.clear()
        run.method.loss("student", run._micro_batches(0)[0], run._roles)
        first, second = [mask for network in networks for mask in network.masks]
        assert torch.equal(first, second)
        assert 0 < (first == 0).sum() < first.numel()
        assert all((mask == 1).all() for mask in run.teacher.family.backbone.masks)
        run.method.loss("student", run._micro_batches(0)[0], run._roles)
        assert not torch.equal(networks[0].masks[-1], first)  # another update drops others


def test_a_pass_leaves_the_generator_where_the_student_left_it() -> None:
    """Else the next update would repeat the masks of this one."""
    teacher = Teacher.from_module(Dropped(), RectifiedFlow(), "flow_prediction", shape=(8,), prompts=["0"])
    network = Denoiser(Dropped().train(), teacher.process, "flow_prediction")
    roles = ExactRoles(teacher, student=network)
    x, t = torch.randn(4, 8), torch.full((4,), 0.5)
    student, target = two_passes(roles, "student", (x, t), (x, t), None)  # type: ignore[arg-type]
    again, _ = two_passes(roles, "student", (x, t), (x, t), None)  # type: ignore[arg-type]
    assert torch.equal(student.x0, target.x0)
    assert not torch.equal(student.x0, again.x0)
    assert student.x0.requires_grad
    assert not target.x0.requires_grad


def test_a_student_with_dropout_is_exported_and_looked_at_without(tmp_path: Path) -> None:
    teacher = Teacher.from_module(Dropped(), RectifiedFlow(), "flow_prediction", shape=(8,), prompts=["0"])
    with started(Consistency(kind="ect", dropout=True, **PAIRS), tmp_path, teacher, validate_every=1) as run:
        student = run._roles.modules["student"]
        run.advance()
        student.masks.clear()
        run._validate()
        assert student.masks
        assert all((mask == 1).all() for mask in student.masks)
        assert student.training
        assert student.dropout.training
        assert not run._roles.merged("student").training


@pytest.mark.parametrize("kind", ["cd", "ct", "ict", "ect"])
def test_a_plan_counts_all_of_it_without_values(kind: Any, tmp_path: Path) -> None:
    method = Consistency(kind=kind, **PAIRS)
    found = plan(method, Teacher.planned("fashion"), Config(output_dir=tmp_path, batch_size=2, max_steps=3), prompts=["a red boot"])
    assert found.unknown == []
    assert found.refusals == []
    assert (found.updates["student"].activations or 0) > 10**6
    assert found.samples["student"] == Calls(6 if method.averages else 12, 6)


# --- guidance, and what is refused


def test_only_cd_asks_the_teacher(tmp_path: Path) -> None:
    for kind, solver, asked in (("cd", "heun", 4), ("cd", "ddim", 2), ("ct", "heun", 0)):
        method = Consistency(kind=kind, solver=solver, **PAIRS)  # type: ignore[arg-type]
        with started(method, tmp_path / f"{kind}-{solver}") as run, listening(run) as calls:
            shake(run)
            run._iteration(0)
            found = Counter({name: 0 for name in ("teacher", "target")})
            for call in calls:
                found[call.role] += len(call.x_t) // 4
            assert found == {"teacher": asked, "student": 1, "target": 1}
        assert method.teacher_guidance() == 3.0
    assert Consistency(kind="ict", guidance_scale=7.0).teacher_guidance() == 3.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "lcm"}, "kind"),
        ({"solver": "euler"}, "solver"),
        ({"norm": "lpips"}, "norm"),
        ({"grid_size": 1}, "grid_size"),
        ({"kind": "ict", "curriculum": (9, 3)}, "s0 <= s1"),
        ({"kind": "ct", "curriculum": (1, 3)}, "2 <= s0"),  # N = 1 has no interval
        ({"target_decay": 1.0}, "stay the teacher"),
        ({"kind": "ct", "target_decay": 0.0}, "above 0 in ct"),
        ({"easy_map": (1.0, 8.0, 1.0)}, "q > 1"),
        ({"huber_c": -1.0}, "c >= 0"),
        ({"stages": 0}, "stages"),
        ({"log_nsr_std": 0.0}, "log_nsr_std"),
        ({"steps": 51}, "steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Consistency(**fields)
