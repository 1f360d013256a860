"""Monitors: planted trouble raises the one signal it should, and a sound run raises none."""

import json
import math
from pathlib import Path

import pytest
import torch
from short_runs import shake, started

from fastdiff.trainers import DMD2, ODEPairs
from fastdiff.trainers._monitors import MONITORS, Monitor, Reference, fake_score_lag, look, warnings_of
from fastdiff.trainers.health import Health

SOUND = {
    "fake_score_lag": 0.9,
    "deviation": 1.0,
    "channel_drift": 0.2,
    "saturation": 0.0,
    "skipped": 0.0,
    "discriminator_loss": 1,
    "drift": 0.01,
}
TROUBLE = {
    "fake_score_lag": 1.5,
    "deviation": 0.2,
    "channel_drift": 2,
    "saturation": 0.5,
    "skipped": 0.1,
    "discriminator_loss": 0,
    "drift": 0.2,
}


def reference(n: int = 64) -> Reference:
    x = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 2.0, 1.0])[:, None, None]
    return Reference(x, (x[:, :3] / 6 + 0.5).clamp(0, 1))


def test_a_sound_run_raises_nothing_and_each_signal_has_its_own_advice() -> None:
    assert set(SOUND) == set(MONITORS)
    assert warnings_of(SOUND) == {}
    for name, value in TROUBLE.items():
        assert list(warnings_of({**SOUND, name: value})) == [name]
        assert list(warnings_of({**SOUND, name: math.nan})) == [name]
    assert len(set(warnings_of(TROUBLE).values())) == len(MONITORS)


def test_the_teachers_own_samples_raise_nothing() -> None:
    signals = look(reference().latents, reference().images, reference())
    assert signals == {"deviation": 1.0, "channel_drift": 0.0, "saturation": 0.0}


def test_samples_that_are_all_alike_are_a_collapse() -> None:
    own = reference()
    collapsed = own.latents[:1] + 0.1 * own.latents
    signals = look(collapsed, own.images, own)
    assert signals["deviation"] == pytest.approx(0.1, rel=1e-6)
    assert list(warnings_of(signals)) == ["deviation"]


def test_a_single_colour_is_a_drift_of_its_channel_in_the_teachers_deviations() -> None:
    own = reference()
    shifted = own.latents + torch.tensor([0.0, 0.0, 6.0, 0.0])[:, None, None]
    signals = look(shifted, own.images, own)
    assert signals["channel_drift"] == pytest.approx(6.0 / own.latents[:, 2].std().item(), rel=1e-3)
    assert list(warnings_of(signals)) == ["channel_drift"]


def test_values_at_the_ends_are_counted_above_the_teachers_share() -> None:
    own = reference()
    images = torch.where(torch.arange(8) < 5, torch.ones(()), own.images)
    before, after = (((part <= 0.002) | (part >= 0.998)).float().mean().item() for part in (own.images, images))
    signals = look(own.latents, images, own)
    assert signals["saturation"] == pytest.approx(after - before, abs=1e-6)
    assert after > 5 / 8
    assert list(warnings_of(signals)) == ["saturation"]


def test_a_fake_score_that_is_the_teacher_has_lag_one_and_a_spoilt_one_more(tmp_path: Path) -> None:
    with started(DMD2(), tmp_path) as run:
        x, cond = torch.randn(8, *run.teacher.latent_shape), run.teacher.encode([""] * 8)
        assert fake_score_lag(run._roles, x, cond, torch.Generator().manual_seed(0)) == pytest.approx(1.0, rel=1e-5)
        for p in run._roles.parameters("fake_score"):
            p.data.mul_(1.5)
        assert fake_score_lag(run._roles, x, cond, torch.Generator().manual_seed(0)) > 1.2


def test_a_planted_collapse_is_said_logged_and_kept_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A student whose output does not depend on its noise."""
    with started(ODEPairs(pairs=8, pair_steps=2), tmp_path, validate_every=1, max_steps=2) as run:
        run._roles.modules["student"].conv_out.weight.data.zero_()
        run._roles.modules["student"].conv_in.weight.data.zero_()
        run.method.sample = lambda student, noise, cond, generators=None: 0.01 * noise  # type: ignore[method-assign]
        run.advance()
        run._after_iteration()
        run.advance()
        assert "deviation" in run._monitor.warnings
        assert capsys.readouterr().out.count("collapse") == 1
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["health/deviation"] < 0.4


def test_looking_changes_neither_the_ledger_nor_the_run(tmp_path: Path) -> None:
    found = []
    for every in (0, 1):
        with started(DMD2(ratio=(1, 2)), tmp_path / str(every), validate_every=every) as run:
            shake(run)
            for _ in range(3):
                run.advance()
                if every:
                    run._monitor.look({}, 0.0)
            found.append((dict(run._roles.ledger), torch.cat([p.detach().flatten() for p in run._roles.parameters("student")])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_share_of_skipped_updates_survives_a_checkpoint() -> None:
    health, again = Health(10), Health(10)
    for norm in (1.0, math.nan, 1.0, 1.0):
        health.accept(norm, update="student", step=0)
    again.load(health.state())
    assert again.share == health.share == 0.25


def test_the_reference_is_made_once(tmp_path: Path) -> None:
    with started(DMD2(), tmp_path) as run:
        monitor = Monitor(run.method, run._roles, *run._fixed(4))
        monitor.look({}, 0.0)
        first = monitor._reference
        monitor.look({}, 0.0)
        assert monitor._reference is first
