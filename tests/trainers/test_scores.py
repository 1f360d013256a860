"""A fake score that goes ahead of its student, in every method that has one."""

from pathlib import Path

import pytest
import torch
from short_runs import METHODS, shake, started, variants_of

from fastdiff.errors import UserError
from fastdiff.trainers import DiffInstruct
from fastdiff.trainers._scores import FakeScored
from fastdiff.trainers.method import Method

LED = [kind for kind in METHODS if issubclass(kind, FakeScored)]


@pytest.mark.parametrize("kind", LED, ids=[kind.name() for kind in LED])
def test_the_student_waits_for_its_fake_score_and_nothing_else_changes(kind: type[FakeScored]) -> None:
    variant = next(iter(variants_of(kind).values()))
    settings = {k: v for k, v in vars(variant).items() if not k.startswith("_") and k != "fake_score_warmup"}
    plain, ahead = kind(**settings), kind(**settings, fake_score_warmup=7)
    start = settings.get("warm_start_steps", 0)
    for step in range(start + 20):
        updates = ahead.updates(step)
        if start <= step < start + 7:
            assert updates == tuple(u for u in plain.updates(step) if u not in {"student", "ratio"})
            assert "fake_score" in updates
        else:
            assert updates == plain.updates(step)


def test_a_fake_score_alone_sees_what_it_sees_after_the_students_update(tmp_path: Path) -> None:
    """The samples come from the same draws, whichever update makes them."""
    found = []
    for number, updates in enumerate([("student", "fake_score"), ("fake_score",)]):
        with started(DiffInstruct(), tmp_path / str(number)) as run:
            shake(run)
            (batch,) = run._micro_batches(3)
            for update in updates:
                run._backward(update, [batch], (update,))
            found.append(torch.cat([p.grad.flatten() for p in run._roles.parameters("fake_score")]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", LED, ids=[kind.name() for kind in LED])
def test_a_negative_warmup_is_refused(kind: type[Method]) -> None:
    with pytest.raises(UserError, match="fake_score_warmup"):
        kind(fake_score_warmup=-1)
