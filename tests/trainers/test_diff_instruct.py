"""Diff-Instruct: the law of its noise, the unweighted gradient, and a fake score in train mode."""

from pathlib import Path

import pytest
import torch
from short_runs import started
from torch import Tensor, nn

from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.models.law import LawDenoiser
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.proof.exactness import Setting, sample_gradients
from fastdiff.trainers import DiffInstruct
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Method

VARIANTS: dict[str, Method] = {"guided": DiffInstruct(guidance_scale=2.0, fake_score_warmup=1)}
OFF = Setting(shift=0.3, spread=1.2)


def test_the_gradient_is_the_difference_of_denoisers_summed_and_unweighted() -> None:
    """n times the gradient of a sample is mu_f - mu_r itself: no mean over elements, no normaliser, no weight."""
    method = DiffInstruct()
    gradient, batch, roles = sample_gradients(method, OFF)
    with torch.no_grad():
        process = roles.teacher.process
        t, eps = method.drawn_times("student_t", batch), batch.noise("student_eps")
        x = roles.student(batch.noise("z"), t, batch.cond).x0
        x_t = process.add_noise(x, eps, t)
        want = LawDenoiser(roles.fake)(x_t, t, batch.cond).x0 - LawDenoiser(roles.teacher.law)(x_t, t, batch.cond).x0
    assert want.norm() > 0.1
    assert (gradient - want).norm() < 1e-9 * want.norm()


def test_the_optimum_is_at_rest_and_descent_moves_towards_the_law() -> None:
    assert sample_gradients(DiffInstruct(), Setting())[0].abs().max() < 1e-10
    pull = sample_gradients(DiffInstruct(), Setting(shift=0.3, n=2000))[0].mean(0)
    assert pull @ torch.full((4,), 0.3, dtype=torch.float64) > 0.03  # the same amount off in every direction


def times(process: NoiseProcess, prediction_type: str, n: int = 20_000) -> tuple[Tensor, DiffInstruct]:
    teacher = Teacher.from_module(nn.Linear(1, 1), process, prediction_type, shape=(1,))
    batch = Batch(Draws(0, 0, 0, size=n, part=slice(n)), None, teacher)  # type: ignore[arg-type]
    return DiffInstruct().drawn_times("student_t", batch), DiffInstruct()


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_the_log_of_the_noise_to_signal_ratio_is_normal_under_every_process(process: NoiseProcess) -> None:
    t, _ = times(process, "sample")
    log_nsr = process.nsr(t).log()
    error = 1.2 / 20_000**0.5
    assert abs(log_nsr.mean() + 1.2) < 4 * error
    assert abs(log_nsr.std() - 1.2) < 4 * error / 2**0.5
    assert process.t_min <= t.min() <= t.max() <= process.t_max


def test_a_process_that_ends_sooner_gets_its_ends() -> None:
    """Stable Diffusion's first row has r = 0.029: two and a half per cent of the law are below it."""
    process = laws.process()
    t, _ = times(process, "sample")
    ends = process.nsr(torch.tensor([0, 999])).log()
    below = torch.distributions.Normal(-1.2, 1.2).cdf(process.nsr(torch.tensor([0, 1])).log().mean())
    assert not t.is_floating_point()
    assert t.min() == 0
    assert abs((t == 0).double().mean() - below) < 4 * (below * (1 - below) / 20_000) ** 0.5
    inside = (t > 0) & (t < 999)
    wanted = -1.2 + 1.2 * Draws(0, 0, 0, size=20_000, part=slice(20_000)).normal("student_t", ()).double()
    gaps = process.nsr(torch.arange(1000)).log().diff().max()
    assert (process.nsr(t[inside]).log() - wanted[inside]).abs().max() <= gaps / 2 + 1e-6
    assert ends[0] < -3.5


class Dropped(nn.Module):
    """A network of one dropout, whose mode shows in what it puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.ones(8)), nn.Dropout(0.5)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.dropout(self.scale * x_t)


def test_dropout_is_at_work_in_the_fake_score_alone(tmp_path: Path) -> None:
    teacher = Teacher.from_module(Dropped(), RectifiedFlow(), "flow_prediction", shape=(8,))
    with started(DiffInstruct(), tmp_path, teacher) as run:
        x = torch.ones(4, 8)
        zeros = {
            name: (run._roles.network(name)(x, x[:, 0], None) == 0).sum().item() for name in ("teacher", "student", "fake_score")
        }
    assert zeros["teacher"] == zeros["student"] == 0
    assert 0 < zeros["fake_score"] < 32
