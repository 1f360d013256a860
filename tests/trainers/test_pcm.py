"""PCM: where its phases end, its loss by hand, at both extremes and for an exact student, and deterministic sampling."""

from pathlib import Path

import pytest
import torch
from short_runs import shake, started
from torch import Tensor

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, expand
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import LCM, PCM, _latent
from fastdiff.trainers.method import Method
from fastdiff.trainers.trajectory import trajectory

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "range-4-phases": PCM(guidance_range=(2.0, 4.0), sample_guidance_scale=2.5, decay=0.5, **PAIRS),
    "one-scale-2-phases": PCM(
        guidance_range=(2.0, 2.0), steps=2, original_steps=20, distance="squared", lr=1e-3, huber_c=0.1, **PAIRS
    ),
}


def test_phases_end_where_the_next_call_is_and_an_edge_starts_the_phase_below_it() -> None:
    method = PCM()
    assert method.levels() == [999, 749, 499, 249]
    level, lower, end = method.neighbours(torch.arange(40))
    assert level.tolist() == list(range(24, 1000, 25))
    assert lower.tolist() == [0, *range(24, 975, 25)]
    for start, edge in ((0, 0), (10, 249), (20, 499), (30, 749)):
        assert end[start : start + 10].tolist() == [edge] * 10
    assert (end <= lower).all()
    assert (end == lower).nonzero()[:, 0].tolist() == [0, 10, 20, 30]
    assert PCM(original_steps=50).edges() == [0, 12, 25, 37, 50]  # the released code's
    assert PCM(original_steps=50).levels() == [999, 739, 499, 239]


def test_the_loss_is_the_distance_of_the_two_jumps(tmp_path: Path) -> None:
    with started(PCM(guidance_range=(3.0, 3.0), **PAIRS), tmp_path, batch_size=16) as run:
        shake(run)
        batch, roles, process = run._micro_batches(0)[0], run._roles, run.teacher.process
        got = run.method.loss("student", batch, roles)["consistency"]
        _, x0, cond = run.method.draw_pairs(batch)
        n = batch.draws.integers("n", 0, 40)
        t, u, e = 25 * n + 24, (25 * n - 1).clamp(min=0), (250 * (n // 10) - 1).clamp(min=0)

        def jump(role: str, x: Tensor, s: Tensor, *, guided: bool = False) -> Tensor:
            p = roles.denoiser(role)(x, s, cond)
            parts = [p.x0, p.eps]
            if guided:
                null = roles.denoiser(role)(x, s, batch.null)
                parts = [3 * p.x0 - 2 * null.x0, 3 * p.eps - 2 * null.eps]
            end = u if guided else e
            a, b = (c(end)[:, None, None, None].float() for c in (process.alpha, process.sigma))
            return a * parts[0] + b * parts[1]

        x_t = process.add_noise(x0, batch.noise("eps"), t)
        with torch.no_grad():
            x_u = jump("teacher", x_t, t, guided=True)
            d = jump("student", x_t, t) - jump("target", x_u, u)
    assert got.item() == pytest.approx(((d**2 + 1e-6).sqrt() - 1e-3).mean().item(), rel=1e-5)
    assert got > 1e-3


def test_with_a_phase_for_each_time_it_is_regression_on_the_teacher_s_own_steps(tmp_path: Path) -> None:
    """The unguided teacher's own network has no loss; LCM's has."""
    fields = {"guidance_range": (1.0, 1.0), "distance": "squared", "original_steps": 20, **PAIRS}
    losses = []
    for name, method in (("pcm", PCM(steps=20, **fields)), ("lcm", LCM(**fields))):  # type: ignore[arg-type]
        with started(method, tmp_path / name, batch_size=16) as run:
            losses.append(method.loss("student", run._micro_batches(0)[0], run._roles)["consistency"].item())
    assert losses[0] < 1e-9
    assert losses[1] > 1e-4


class PhasedFlowMap(Denoiser):
    """The x0 whose jump lands where the exact trajectory is at the end of its phase."""

    def __init__(self, law: Gaussian, method: PCM) -> None:
        super().__init__(lambda x_t, t, cond: x_t, law.process, "sample")
        self.law, self.method = law, method
        self.levels = torch.arange(0, 1000)
        self.times = law.process.at_level(self.levels)

    def end_of(self, t: Tensor) -> Tensor:
        level = self.levels[torch.searchsorted(self.times.double(), t.double() - 1e-9).clamp(max=999)]
        edges = torch.tensor([0, *reversed(self.method.levels())])
        return self.process.at_level(edges[(torch.searchsorted(edges, level) - 1).clamp(min=0)])

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Prediction:
        end = self.end_of(t)
        (a_t, s_t), (a_e, s_e) = ([expand(c(time), x_t) for c in (self.process.alpha, self.process.sigma)] for time in (t, end))
        gap = a_e - a_t * s_e / s_t
        x0 = (self.law.flow_map(x_t, t, end) - s_e / s_t * x_t) / torch.where(gap == 0, 1, gap)  # at the edge any x0 does
        return Prediction(x_t, t, x0, self.process)


@pytest.mark.parametrize("process", [laws.process(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__)
def test_a_student_whose_jumps_are_exact_has_no_loss_and_samples_the_exact_map(
    process: NoiseProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = Gaussian.anisotropic(process, d=4)
    teacher = Teacher.from_module(TimeMLP(4), process, "sample", shape=(4,), law=law)
    method = PCM(guidance_range=(1.0, 1.0), pairs=200, pair_steps=2, pair_guidance_scale=1.0)
    exact = PhasedFlowMap(law, method)
    with started(method, tmp_path, teacher, batch_size=200) as run:
        run._roles.denoiser = lambda name, own=run._roles.denoiser: own(name) if name == "teacher" else exact
        batch = run._micro_batches(0)[0]
        batch.draws.normal = lambda name, shape, own=batch.draws.normal: own(name, shape).double()
        monkeypatch.setattr(_latent, "ddim_step", lambda p, u: law.flow_map(p.x_t, p.t, u))
        assert abs(method.loss("student", batch, run._roles)["consistency"].item()) < 1e-9
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = process.at_level(torch.full((50,), 999))
    end = law.flow_map(process.initial_scale * noise, start, process.at_level(torch.zeros(50, dtype=torch.long)))
    calls = trajectory(exact, noise, None, method.levels(), "ddim")
    landed = ddim_step(calls[-1], process.at_level(torch.zeros(50, dtype=torch.long)))
    assert (landed - end).abs().max() < 1e-9
    assert torch.equal(method.sample(exact, noise, None), calls[-1].x0)  # the sampler's end, below level 0


def test_phases_of_unequal_length_are_refused_where_no_scheduler_visits_their_edges(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="original_steps=40"), started(PCM(original_steps=50, **PAIRS), tmp_path):
        pass
