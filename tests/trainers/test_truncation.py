"""TCM: which times are trained, who says what below t', the weights of both means, and the two stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import shake, started
from tiny import tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.diffusion.process import EDM, NoiseProcess, RectifiedFlow, TrigFlow
from fastdiff.diffusion.times import log_normal_above
from fastdiff.errors import UserError
from fastdiff.models.roles import Start
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import Consistency
from fastdiff.trainers._consistency import Truncated, falling_grid, finite_ratios, grid_interval
from fastdiff.trainers._plan import plan
from fastdiff.trainers.config import Config

PAIRS: dict[str, Any] = {"pairs": 12, "pair_steps": 2}
PROCESSES = {"edm": EDM(), "vp": laws.process(), "flow": RectifiedFlow(), "trigflow": TrigFlow()}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
each_kind = pytest.mark.parametrize("kind", ["cd", "ct", "ict", "ect"])


def truncated(kind: str = "cd", **fields: Any) -> Consistency:
    given = {"kind": kind, "guidance_scale": 1.0, "curriculum": (12, 12), "curriculum_steps": 8, "truncation": 1.0, **PAIRS}
    return Consistency(**{**given, **fields})


def changed(run: Trainer, role: str, update: str, step: int = 8) -> float:
    """How much the loss of an update moves when a role's weights do."""
    (batch,) = run._micro_batches(step)
    losses = []
    for size in (0.0, 0.05):
        for p in run._roles.parameters(role):
            p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
        losses.append(run.method.loss(update, batch, run._roles)["consistency"].item())
    return abs(losses[1] - losses[0])


# --- times


@each_process
def test_no_time_of_a_grid_is_below_the_edge_and_the_chosen_samples_are_on_it(process: NoiseProcess) -> None:
    u = torch.arange(4000, dtype=torch.float64) / 4000
    at_edge = torch.arange(4000) % 4 == 0
    at = grid_interval(process, 18, u, None, Truncated(1.0, at_edge))
    grid = falling_grid(process, 18)
    rho = finite_ratios(process, grid)
    cut = int((rho[:-1].log().abs()).argmin())  # nearest to 1
    assert at.edge == rho[cut].item()
    assert (at.t[at_edge] == grid[cut]).all()
    shares = torch.stack([(at.t[~at_edge] == t).double().mean() for t in grid[:-1]])
    assert (shares[: cut + 1] - 1 / (cut + 1)).abs().max() < 2e-3
    assert shares[cut + 1 :].sum() == 0
    assert torch.equal(at.rho_r < at.edge, at.t == grid[cut])


def test_a_truncated_log_normal_is_the_rest_of_the_whole_one() -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = log_normal_above(u, torch.tensor(1.0, dtype=torch.float64), -1.1, 2.0)
    assert drawn.min() >= 1
    normal = torch.distributions.Normal(-1.1, 2.0)
    for rho in (1.5, 4.0, 20.0):
        want = (normal.cdf(torch.tensor(rho).log()) - normal.cdf(torch.tensor(0.0))) / (1 - normal.cdf(torch.tensor(0.0)))
        assert (drawn < rho).double().mean().item() == pytest.approx(want.item(), abs=1e-4)


def test_ect_draws_above_the_edge_and_reaches_below_it(tmp_path: Path) -> None:
    with started(truncated("ect"), tmp_path, batch_size=64) as run:
        (batch,) = run._micro_batches(8)
        cut = run.method.truncated("truncated", batch)
        assert cut is not None
        at, process = run.method.interval(batch, cut), run.teacher.process
        edge = process.nsr(process.t_from_nsr(torch.tensor(1.0)))
    assert at.edge == edge
    assert (at.rho_t >= edge).all()
    assert (at.rho_t[cut.at_edge] == edge).all()
    assert 5 < cut.at_edge.sum() < 28
    assert 0 < (at.rho_r < edge).sum() < 64


# --- who says what


@each_kind
def test_below_the_edge_the_frozen_student_answers_and_above_it_the_method_s_own_target(kind: str, tmp_path: Path) -> None:
    """All samples on the edge: only the frozen network matters; none below it: it does not."""
    target = "target" if kind in {"cd", "ct"} else "student"
    for share, asks, ignores in ((1 - 1e-9, "boundary", "target"), (0.0, target, "boundary")):
        low, near = (1.0, 8.0) if share else (0.03, 0.0)  # below 0.03 is t_min, where every network says the same; r next to t
        method = truncated(kind, boundary_share=share, truncation=low, easy_map=(256.0, near, 1.0))
        with started(method, tmp_path / f"{kind}-{share}", batch_size=8) as run:
            shake(run)
            assert changed(run, asks, "truncated") > 1e-5
            if ignores in run._roles.specs:
                assert changed(run, ignores, "truncated") == 0


@each_kind
def test_the_frozen_student_gets_no_gradient_and_does_not_move_in_its_stage(kind: str, tmp_path: Path) -> None:
    with started(truncated(kind, truncation_start=2, target_decay=0.5), tmp_path, warmup_steps=0, ema_decay=0.5) as run:
        for _ in range(2):
            run.advance()
        averaged = [p.clone() for p in run._ema.shadow_params]
        assert not torch.equal(averaged[0], run._roles.parameters("student")[0])
        run.advance()
        assert all(map(torch.equal, averaged, run._roles.parameters("boundary")))
        hashes = [_hash(run, "boundary"), _hash(run, "student")]
        for _ in range(3):
            run.advance()
        assert _hash(run, "boundary") == hashes[0]
        assert _hash(run, "student") != hashes[1]
        (batch,) = run._micro_batches(6)
        for p in run._roles.parameters("boundary"):
            p.requires_grad_(True)
        run.method.loss("truncated", batch, run._roles)["consistency"].backward()
        assert all(p.grad is None for p in run._roles.parameters("boundary"))


def _hash(run: Trainer, role: str) -> str:
    return Start(weights={role: run._roles.state(role)}).hash()


# --- limits


def test_at_the_lowest_time_without_a_share_it_is_plain_cd_to_the_bit(tmp_path: Path) -> None:
    losses = []
    for name, method in (
        ("plain", Consistency(guidance_scale=1.0, **PAIRS)),
        ("lowest", truncated(truncation=0.0292, boundary_share=0.0)),
        ("above", truncated(truncation=1.0, boundary_share=0.0)),
    ):
        with started(method, tmp_path / name, batch_size=16) as run:
            shake(run)
            for p in run._roles.parameters("boundary") if "boundary" in run._roles.specs else []:
                p.data += 0.1
            (batch,) = run._micro_batches(3)
            losses.append(method.loss(method.updates(3)[0], batch, run._roles)["consistency"])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_the_loss_is_the_sum_of_both_means_in_expectation(tmp_path: Path) -> None:
    """A share of a quarter and a weight of 0.1: 4/3 on the one kind and 0.4 on the other."""
    method = truncated(boundary_share=0.25, boundary_weight=0.1)
    at_edge = torch.tensor([True, False, False, False])
    weights = method.weights(Truncated(1.0, at_edge))
    assert weights is not None
    assert weights.tolist() == pytest.approx([0.4, 4 / 3, 4 / 3, 4 / 3])
    with started(method, tmp_path, batch_size=64) as run:
        shake(run)
        (batch,) = run._micro_batches(0)
        got = method.loss("truncated", batch, run._roles)["consistency"].item()
        cut, seen = method.truncated("truncated", batch), list[Tensor]()
        assert cut is not None
        method.weights = lambda truncated: (seen.append(truncated.at_edge), None)[1]  # type: ignore[method-assign]
        for mask in (cut.at_edge, ~cut.at_edge):
            run.method._distance = lambda p, e, at, w, m=mask: (p - e)[m].square().mean()  # type: ignore[method-assign]
            seen.append(method.loss("truncated", batch, run._roles)["consistency"])
    edge, inner = (value for value in seen if value.dtype != torch.bool)
    n, on = 64, int(cut.at_edge.sum())
    assert got == pytest.approx((0.4 * on / n * edge + 4 / 3 * (n - on) / n * inner).item(), rel=1e-5)


# --- stages


def test_stages_and_their_roles() -> None:
    method = truncated(truncation_start=3)
    assert [method.updates(step)[0] for step in range(5)] == 3 * ["student"] + 2 * ["truncated"]
    assert [step for step in range(6) if method.restarts(step)] == [3]
    assert truncated().restarts(0) == ()
    assert "boundary" in method.roles()
    assert "boundary" not in Consistency().roles()


def test_a_second_stage_alone_is_held_by_the_student_it_begins_from(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    weights = {key: value + 0.01 for key, value in teacher.family.backbone.state_dict().items()}
    method = truncated("ect")
    run = Trainer(method, teacher, output_dir=tmp_path, max_steps=3, batch_size=4, start=Start(weights={"student": weights}))
    try:
        run.start()
        run.advance()
        held = run._roles.state("boundary")
    finally:
        run.close()
    assert all(torch.equal(held[key], value) for key, value in weights.items())


def test_a_run_that_ends_before_its_second_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="truncation_start is 9"):
        Trainer(truncated(truncation_start=9), tiny_teacher(), output_dir=tmp_path, max_steps=9)


@pytest.mark.parametrize(
    "fields",
    [{"truncation": 0.0}, {"boundary_share": 1.0}, {"boundary_weight": -0.1}, {"truncation_start": -1}, {"truncation": 20.0}],
)
def test_settings_without_meaning_are_refused(fields: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(fields))), started(truncated(**fields), tmp_path):
        pass


@pytest.mark.parametrize("kind", ["cd", "ect"])
def test_a_plan_counts_the_frozen_network(kind: str, tmp_path: Path) -> None:
    planned = plan(truncated(kind, truncation_start=2), Teacher.planned("fashion"), Config(output_dir=tmp_path, max_steps=5))
    assert not planned.unknown
    assert planned.roles["boundary"].weights == planned.roles["student"].weights
    assert planned.samples["boundary"].forward == 3 * 64
