"""The policy for gradients that are not finite."""

import math

import pytest

from fastdiff.errors import UserError
from fastdiff.trainers.health import Health

BAD = [math.nan, math.inf, -math.inf]


def updates(health: Health, steps: int, **norms: float) -> None:
    """``steps`` iterations that make the updates named, each with its gradient norm."""
    for step in range(steps):
        for update, norm in norms.items():
            health.accept(norm, update=update, step=step)


@pytest.mark.parametrize("norm", BAD)
def test_a_bad_update_is_skipped_and_counted(norm: float) -> None:
    health = Health(max_bad_steps=3)
    assert health.accept(1.0, update="student", step=0)
    assert health.accept(0.0, update="student", step=1)
    assert not health.accept(norm, update="student", step=2)
    assert health.total == 1
    assert health.accept(1e30, update="student", step=3)
    assert health.total == 1


def test_too_many_in_a_row_stop_the_run_and_say_where() -> None:
    health = Health(max_bad_steps=3)
    with pytest.raises(UserError, match="student at step 3"):
        updates(health, 4, student=math.nan)
    assert health.total == 4


def test_good_updates_between_start_the_count_again() -> None:
    health = Health(max_bad_steps=2)
    for step in range(30):
        health.accept(math.nan if step % 3 else 1.0, update="student", step=step)
    assert health.total == 20


def test_good_updates_of_another_role_do_not_hide_a_dead_one() -> None:
    """A student that is NaN for ever beside a fake score that is fine: the run would end with an untrained student."""
    health = Health(max_bad_steps=3)
    with pytest.raises(UserError, match="student"):
        updates(health, 50, student=math.nan, fake_score=1.0)


def test_the_count_survives_a_checkpoint() -> None:
    first = Health(max_bad_steps=3)
    updates(first, 3, student=math.inf)
    second = Health(max_bad_steps=3)
    second.load(first.state())
    assert second.total == 3
    with pytest.raises(UserError):
        second.accept(math.inf, update="student", step=3)
