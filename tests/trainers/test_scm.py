"""sCM: its tangent against the derivative of the consistency function, its gradient against closed forms, and its estimators."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import distance, gradients, shake, started, trainer
from tiny import tiny_teacher, tiny_unet
from torch import Tensor, nn

import fastdiff.trainers.scm as scm_module
from fastdiff import Trainer
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.matching import SNRMatched
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess, RectifiedFlow, TrigFlow, expand
from fastdiff.errors import UserError
from fastdiff.losses import discrete_tangent, normalise_tangent
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import SCM
from fastdiff.trainers._plan import plan
from fastdiff.trainers._tangents import Estimator, angles, trigflow_network
from fastdiff.trainers.config import Config
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Calls, Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "scd": SCM(**_FEW, guidance_scale=2.0, tangent_warmup=0, max_time_share=0.25),
    "sct": SCM(**_FEW, kind="sct", jvp="central", normalisation="rms", extra_weight="inv_sigma", dropout=True, steps=2),
}
SD = 0.8
PLAIN = {"pairs": 64, "pair_steps": 8, "pair_guidance_scale": 1.0, "guidance_scale": 1.0, "sigma_data": SD, "tangent_warmup": 0}
GAUSSIAN = Gaussian.anisotropic(laws.process(), d=4, spread=5.0)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class ExactMap(nn.Module):
    """The end of the trajectory through x_t, in closed form, moved by a weight that is zero."""

    def __init__(self, law: Gaussian) -> None:
        super().__init__()
        process = law.process.continuous() if isinstance(law.process, DiscreteVP) else law.process
        self.law, self.offset = law.under(process), nn.Parameter(torch.zeros(law.shape))

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.law.consistency(x_t, t / self.law.process.network_time(torch.ones(()))) + self.offset


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def exact_teacher(process: NoiseProcess) -> Teacher:
    law = GAUSSIAN.under(process)
    return Teacher.from_module(ExactMap(law), process, "sample", shape=(4,), law=law)


def mlp_teacher(network: nn.Module | None = None, process: NoiseProcess | None = None) -> Teacher:
    process = process or laws.process()
    kind = "flow_prediction" if isinstance(process, RectifiedFlow) else "v_prediction"
    network = network or seeded(lambda: TimeMLP(4, hidden=32, octaves=3))
    return Teacher.from_module(network, process, kind, shape=(4,), law=GAUSSIAN.under(process))


def student_gradient(method: SCM, teacher: Teacher, folder: Path) -> Tensor:
    with started(method, folder, teacher, batch_size=64, max_grad_norm=1e9) as run:
        return gradients(run)["0 student student"]


@dataclasses.dataclass
class Seen:
    """What one loss was computed from and gave."""

    run: Trainer
    x_t: Tensor
    t: Tensor
    velocity: Tensor
    g: Tensor
    loss: Tensor

    @property
    def network(self) -> Callable[[Tensor, Tensor], Tensor]:
        return trigflow_network(self.run._roles.denoiser("student"), SD, torch.full((len(self.t),), -1))

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The student's consistency function."""
        matched = SNRMatched(self.run._roles.denoiser("student").continuous(), TrigFlow(sigma_data=SD))
        return matched(x_t, t, torch.full((len(t),), -1)).x0


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None) -> Iterator[Callable[..., Seen]]:
    """One loss of a method on a small network, in float64, without the normaliser unless it is asked for."""
    runs: list[Trainer] = []

    def look(teacher: Teacher | None = None, *, normalised: bool = False, step: int = 0, **fields: Any) -> Seen:
        tangents: list[Tensor] = []

        def normalise(tangent: Tensor, **options: Any) -> Tensor:
            tangents.append(normalise_tangent(tangent, **options) if normalised else tangent)
            return tangents[-1]

        monkeypatch.setattr(scm_module, "normalise_tangent", normalise)
        run = trainer(SCM(**{**PLAIN, **fields}), tmp_path / str(len(runs)), teacher or mlp_teacher(), batch_size=16)
        runs.append(run)
        run.start()
        shake(run)
        (batch,) = run._micro_batches(step)
        run._roles.train_only("student", "weight")
        (loss,) = run.method.loss("student", batch, run._roles).values()
        x_t, t, velocity, _ = run.method._moments(batch, run._roles)  # type: ignore[attr-defined]
        return Seen(run, x_t, t, velocity, tangents[0], loss)

    yield look
    for run in runs:
        run.close()


def parameters(seen: Seen) -> list[nn.Parameter]:
    return seen.run._roles.parameters("student")


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- the tangent


@pytest.mark.parametrize("process", [laws.process(), RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("jvp", ["forward", "central", "one-sided"])
def test_the_exact_flow_map_of_a_gaussian_is_at_rest(
    process: NoiseProcess, jvp: str, seen: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the exact teacher's trajectories it does not change; a student 0.3 off has somewhere to go."""
    at_rest = seen(exact_teacher(process), jvp=jvp)
    with torch.no_grad():
        parameters(at_rest)[0].zero_()
    (batch,) = at_rest.run._micro_batches(0)
    tangents: list[Tensor] = []
    monkeypatch.setattr(scm_module, "normalise_tangent", lambda tangent, **options: tangents.append(tangent) or tangent)
    for shift in (0.0, 0.3):
        with torch.no_grad():
            parameters(at_rest)[0].fill_(shift)
        at_rest.run.method.loss("student", batch, at_rest.run._roles)
    tolerance = {"forward": 1e-9, "central": 1e-5, "one-sided": 0.03}[jvp]
    assert tangents[0].abs().max() < tolerance
    assert at_rest.velocity.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["scd", "sct"])
def test_the_tangent_is_cos_t_times_the_change_of_the_students_x0_along_the_trajectory(
    kind: str, seen: Callable[..., Seen]
) -> None:
    """By central differences of x0 itself, which know nothing of F."""
    found = seen(kind=kind, jvp="forward")
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (found.x0(found.x_t + s * h * found.velocity, found.t + s * h) for s in (1, -1))
    want = expand(found.t.cos(), ahead) * (ahead - behind) / (2 * h)
    inside = found.t < found.t.max()  # a difference at the last time leaves the table
    assert inside.sum() > 10
    assert distance(found.g[inside], want[inside]) < 1e-5


def test_the_velocity_of_sct_is_that_from_noise_to_data_and_asks_no_teacher(seen: Callable[..., Seen]) -> None:
    found = seen(kind="sct")
    batch = found.run._micro_batches(0)[0]
    _, x0, _ = found.run.method.draw_pairs(batch)  # type: ignore[attr-defined]
    z, t = SD * batch.noise("eps"), found.t
    want = expand(t.cos(), z) * z - expand(t.sin(), x0) * x0
    torch.testing.assert_close(found.velocity, want)
    assert found.run._roles.ledger["teacher"] == 0


def test_the_velocity_of_scd_is_that_of_the_laws_trajectory(seen: Callable[..., Seen]) -> None:
    found = seen(kind="scd")
    want = GAUSSIAN.under(TrigFlow(sigma_data=SD)).velocity(found.x_t, found.t)
    assert distance(found.velocity, want) < 1e-9


def test_the_discrete_tangent_tends_to_it(seen: Callable[..., Seen]) -> None:
    found = seen(jvp="forward")

    def error(dt: float) -> float:
        u = found.t - dt
        x_u = math.cos(dt) * found.x_t - math.sin(dt) * found.velocity
        with torch.no_grad():
            now, then = found.network(found.x_t / SD, found.t), found.network(x_u / SD, u)
            discrete = discrete_tangent(found.x_t, found.t, u, now, then, found.velocity, sigma_data=SD)
        inside = found.t > angles(laws.process(), SD)[0] + 1e-3
        return distance((expand(found.t.cos(), discrete) * discrete)[inside], found.g[inside])

    assert error(1e-5) < 1e-3
    assert error(1e-4) / error(5e-5) == pytest.approx(2, rel=0.1)


# --- the gradient


def test_the_gradient_is_minus_two_weights_times_the_normalised_tangent(seen: Callable[..., Seen]) -> None:
    """Of the student: no gradient comes through the tangent, the frozen F or the teacher."""
    found = seen(normalised=True, jvp="forward")
    got = flat(torch.autograd.grad(found.loss, parameters(found), retain_graph=True))
    w = found.run._roles.modules["weight"](found.t).detach()
    assert w.abs().min() > 1e-4
    pull = -2 * expand(w.exp(), found.g) * found.g / found.g.numel()
    want = flat(torch.autograd.grad(found.network(found.x_t / SD, found.t), parameters(found), grad_outputs=pull))
    assert distance(got, want) < 1e-10


def test_the_gradient_of_the_weight_balances_the_loss(seen: Callable[..., Seen]) -> None:
    found = seen(normalised=True)
    (got,) = torch.autograd.grad(found.loss, [found.run._roles.modules["weight"].linear.bias])
    w = found.run._roles.modules["weight"](found.t).detach()
    want = (w.exp() * found.g.square().mean(1) - 1).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-9)


def test_before_the_warm_up_it_is_the_regression_of_f_to_the_velocity_under_cos_squared(seen: Callable[..., Seen]) -> None:
    found = seen(tangent_warmup=10)
    got = flat(torch.autograd.grad(found.loss, parameters(found)))
    w = found.run._roles.modules["weight"](found.t).detach()
    error = SD * found.network(found.x_t / SD, found.t) - found.velocity
    regression = (expand(w.exp() * found.t.cos().square(), error) * error.square() / SD).mean()
    assert distance(got, flat(torch.autograd.grad(regression, parameters(found)))) < 1e-10


@pytest.mark.parametrize(("max_steps", "warmup"), [(40, 10), (100_000, 10_000)])
def test_an_unset_warm_up_is_a_quarter_of_the_run_and_at_most_the_papers(max_steps: int, warmup: int, tmp_path: Path) -> None:
    with started(SCM(**{**PLAIN, "tangent_warmup": None}), tmp_path, mlp_teacher(), max_steps=max_steps) as run:
        assert run.method._warmup == warmup


def test_the_tangent_grows_in_linearly_over_the_warm_up(seen: Callable[..., Seen]) -> None:
    """Step 4 of 10 against the whole tangent and none, on the batch of step 4."""
    none, part, whole = (
        seen(step=4, jvp="forward", **fields).g for fields in ({"tangent_warmup": 10**9}, {"tangent_warmup": 10}, {})
    )
    assert distance(part, none + 0.4 * (whole - none)) < 1e-7


def test_the_extra_weight_multiplies_the_loss_of_a_sample(seen: Callable[..., Seen]) -> None:
    found = seen(extra_weight="inv_sigma")
    w = found.run._roles.modules["weight"](found.t).detach()
    extra = 1 / (SD * found.t.tan())
    want = (expand(w.exp() * extra, found.g) * found.g.square() - expand(w, found.g)).mean()
    assert found.loss.item() == pytest.approx(want.item(), rel=1e-9)


# --- planted defects


def _plain(velocity: Tensor, t: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    return velocity / sigma_data, torch.ones_like(t)


def _backwards(velocity: Tensor, t: Tensor, *, sigma_data: float) -> tuple[Tensor, Tensor]:
    speed = t.cos() * t.sin()
    return -expand(speed, velocity) * velocity / sigma_data, -speed


@pytest.mark.parametrize("defect", [_plain, _backwards], ids=["not premultiplied", "the other sign"])
def test_a_defect_of_the_tangent_moves_the_exact_flow_map(
    defect: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    fields = {**PLAIN, "jvp": "forward"}
    sound = student_gradient(SCM(**fields), exact_teacher(laws.process()), tmp_path / "sound")
    assert sound.abs().max() < 1e-8
    monkeypatch.setattr(scm_module, "premultiplied_tangents", defect)
    assert student_gradient(SCM(**fields), exact_teacher(laws.process()), tmp_path / "defect").abs().max() > 1e-3


# --- the estimators


def test_single_call_and_two_calls_give_one_gradient_and_differences_come_near(tmp_path: Path, float64: None) -> None:
    fields: dict[str, dict[str, Any]] = {
        "two": {"jvp": "forward"},
        "single": {"jvp": "forward", "single_call": True},
        "central": {"jvp": "central"},
        "one-sided": {"jvp": "one-sided"},
        "auto": {},
    }
    found = {name: student_gradient(SCM(**PLAIN, **own), mlp_teacher(), tmp_path / name) for name, own in fields.items()}
    errors = {name: distance(gradient, found["two"]) for name, gradient in found.items()}
    assert errors["single"] < 1e-12
    assert errors["auto"] == 0
    assert 0 < errors["central"] < 1e-5
    assert 0 < errors["one-sided"] < 1e-5


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.dropout = TimeMLP(4, hidden=32, octaves=3), nn.Dropout(0.5)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.network(self.dropout(x_t), t)


@pytest.mark.parametrize("jvp", ["central", "one-sided"])
def test_all_calls_of_an_update_have_the_same_dropout_masks(jvp: str, tmp_path: Path, float64: None) -> None:
    """Other masks in the derivative would bury it; in a second call, part the gradient from its tangent."""
    single, other = (
        student_gradient(SCM(**PLAIN, dropout=True, **fields), mlp_teacher(seeded(Dropped)), tmp_path / fields["jvp"])
        for fields in ({"jvp": "forward", "single_call": True}, {"jvp": jvp})
    )
    two = student_gradient(SCM(**PLAIN, dropout=True, jvp="forward"), mlp_teacher(seeded(Dropped)), tmp_path / "two")
    without = student_gradient(SCM(**PLAIN, jvp="forward"), mlp_teacher(seeded(Dropped)), tmp_path / "without")
    assert distance(two, single) < 1e-12
    assert distance(other, single) < 1e-5
    assert distance(without, single) > 0.02


@pytest.mark.parametrize(
    ("fields", "forwards"),
    [({"jvp": "forward"}, 2), ({"jvp": "forward", "single_call": True}, 1), ({"jvp": "central"}, 3), ({"jvp": "one-sided"}, 2)],
)
def test_every_estimator_costs_what_is_declared(fields: dict[str, Any], forwards: int, tmp_path: Path) -> None:
    method = SCM(**PLAIN, **fields)
    assert method.calls(("student",))["student"] == Calls(forwards, 1)
    with started(method, tmp_path, mlp_teacher()) as run:
        run._iteration(0)
        assert (run._roles.ledger["student"], run._roles.backwards["student"]) == (4 * forwards, 4)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


class Fused(nn.Module):
    """A kernel with a backward and no forward derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TimeMLP(4, hidden=32, octaves=3)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return NoForward.apply(self.network(x_t, t))


def test_a_kernel_without_a_forward_derivative_is_refused_by_name_and_auto_does_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(SCM(**PLAIN, jvp="forward"), tmp_path / "forward", mlp_teacher(seeded(Fused)))
    with pytest.raises(UserError, match="no forward derivative"):
        run.start()
    run.close()
    with started(SCM(**PLAIN), tmp_path / "auto", mlp_teacher(seeded(Fused))) as run:
        assert run.method._estimator.name == "one-sided"  # type: ignore[attr-defined]
        run._iteration(0)
    assert "derivative of the student's network: one-sided; measured: one_sided" in capsys.readouterr().out


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.table = TimeMLP(4, hidden=32), nn.Embedding(1000, 4)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.network(x_t, t.round()) + self.table(t.round().long())


def test_a_network_that_rounds_its_time_is_refused(tmp_path: Path) -> None:
    run = trainer(SCM(**PLAIN), tmp_path, mlp_teacher(seeded(Rounded)))
    with pytest.raises(UserError, match="rounds its time"):
        run.start()
    run.close()


def test_a_single_call_is_refused_under_gradient_checkpointing_and_without_forward(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.family.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
    with pytest.raises(UserError, match="gradient checkpointing"):
        trainer(SCM(jvp="forward", single_call=True), tmp_path, teacher)
    trainer(SCM(jvp="forward"), tmp_path, teacher)
    for jvp in ("auto", "central", "one-sided"):
        with pytest.raises(UserError, match="jvp=forward"):
            SCM(single_call=True, jvp=jvp)


def test_a_diffusers_unet_takes_the_times_between_two_rows() -> None:
    """And the same at whole ones: the student is sampled at integers."""
    network = seeded(tiny_unet).eval()
    x, cond = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 16, 32)
    with torch.no_grad():
        whole, real, between = (network(x, torch.tensor([t]), encoder_hidden_states=cond).sample for t in (500, 500.0, 500.25))
    assert torch.equal(whole, real)
    assert 0 < distance(between, whole) < 0.05


# --- times


def drawn(method: SCM, process: NoiseProcess, n: int = 20_000) -> Tensor:
    teacher = Teacher.from_module(nn.Linear(1, 1), process, "v_prediction", shape=(1,))
    method._begin(Estimator("forward"), teacher)
    return method.drawn_times(Batch(Draws(0, 0, 0, size=n, part=slice(n)), None, teacher))  # type: ignore[arg-type]


def test_times_are_log_normal_in_the_noise_to_signal_ratio_and_end_where_the_process_does() -> None:
    process, method = laws.process(), SCM(log_mean=-0.5, log_std=1.0, sigma_data=SD)
    t = drawn(method, process)
    r = (SD * t.tan()).log()
    ends = process.nsr(torch.tensor([0, 999])).log()
    inside = (r > ends[0] + 1e-4) & (r < ends[1] - 1e-4)
    above = 1 - torch.distributions.Normal(-0.5, 1.0).cdf(ends[1].float()).item()
    assert ((r >= ends[1] - 1e-4).double().mean() - above).abs() < 4 * (above / 20_000) ** 0.5
    assert r.max() <= ends[1]
    assert abs(r[inside].median() + 0.5) < 0.05
    assert (drawn(method, RectifiedFlow()).max()) < math.pi / 2


def test_a_share_of_the_samples_is_at_the_last_time() -> None:
    method = SCM(max_time_share=0.3, log_mean=-2.0, log_std=0.5)
    t = drawn(method, laws.process())
    last = angles(laws.process(), 1.0)[1]
    assert ((t - last).abs() < 1e-5).double().mean().item() == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize("name", ["central", "one-sided"])
def test_no_difference_leaves_the_range_of_the_process(name: Any) -> None:
    low, high = Estimator(name, step=1e-2).within(0.1, 1.5)
    assert low * (1 - 1e-2) >= 0.1
    assert (high * (1 + 1e-2) if name == "central" else high) <= 1.5


# --- fields


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "cd"},
        {"normalisation": "l2"},
        {"extra_weight": "sigma"},
        {"jvp": "backward"},
        {"sigma_data": 0.0},
        {"c": -1.0},
        {"max_time_share": 1.0},
        {"tangent_warmup": -1},
        {"steps": 0},
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        SCM(**fields)


def test_a_plan_runs_the_loss_without_a_derivative(tmp_path: Path) -> None:
    """On the meta device nothing can be measured; the graph that the loss keeps is the ordinary forward's."""
    kept = {}
    for kind in ("scd", "sct"):
        config = Config(output_dir=tmp_path, batch_size=4)
        found = plan(SCM(**_FEW, kind=kind), Teacher.planned("fashion"), config, prompts=["a red boot"])
        assert not found.unknown
        kept[kind] = found.updates["student"].activations
    assert kept["scd"] == kept["sct"] > 10**6


def test_the_student_equals_the_teacher_that_made_its_velocity_or_its_data() -> None:
    fields = {"guidance_scale": 2.0, "pair_guidance_scale": 4.0}
    assert (SCM(**fields).teacher_guidance(), SCM(kind="sct", **fields).teacher_guidance()) == (2.0, 4.0)
    assert SCM(steps=2).levels() == [999, 499]
