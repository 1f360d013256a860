"""The engine by itself: health, interrupt, resume, options, the averaged weights. What it does with methods: the gauntlet."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from short_runs import run_to, tensors_of, trainer
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import checkpoint
from fastdiff.trainers.method import Batch, Calls, Method, Paper, one_step


@dataclass(kw_only=True)
class Sick(Method):
    """Its gradient is not finite in the iterations ``bad``."""

    info: ClassVar[Paper] = Paper(title="", venue="", year=2026, arxiv="", sheet="")
    bad: tuple[int, ...] = ()
    interrupt_at: int = -1

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=1e-3)}

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {"student": Calls(1, 1)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        step = batch.draws.key[2]
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        x0 = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        return {"loss": x0.square().mean() * (torch.inf if step in self.bad else 1.0)}


def test_a_bad_update_is_skipped_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(Sick(bad=(1,)), tmp_path, max_steps=9, warmup_steps=0)
    run.start()
    run.advance()
    before = [p.clone() for p in run._roles.parameters("student")]
    run.advance()
    assert all(torch.equal(a, b) for a, b in zip(before, run._roles.parameters("student"), strict=True))
    assert run._health.total == 1
    run.advance()
    assert not all(torch.equal(a, b) for a, b in zip(before, run._roles.parameters("student"), strict=True))
    assert all(torch.isfinite(p).all() for p in run._roles.parameters("student"))
    run.close()
    assert "skipped an update of student" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 1]


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    run = trainer(Sick(bad=tuple(range(1, 9))), tmp_path, max_steps=9, max_bad_steps=3)
    with pytest.raises(UserError, match="4 updates in a row"):
        run.train()


def test_interrupt_leaves_a_checkpoint_that_resumes_to_the_bit(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="3 of 6"):
        trainer(Sick(interrupt_at=2), tmp_path / "cut", max_steps=6).train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints").name == "step-00000003"
    run = run_to(Sick(interrupt_at=2), tmp_path / "cut", 6, max_steps=6, resume=True)
    assert run._step == 6
    run_to(Sick(interrupt_at=-1), tmp_path / "straight", 6, max_steps=6)
    cut, straight = tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "straight")
    assert all(torch.equal(v, cut[n][k]) for n, values in straight.items() for k, v in values.items())


def test_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    run_to(Sick(), tmp_path, 2, max_steps=4)
    with pytest.raises(UserError, match="batch_size was 4 and is 2"):
        trainer(Sick(), tmp_path, max_steps=4, batch_size=2, resume=True).start()


def test_a_second_run_does_not_mix_with_the_checkpoints_of_the_first(tmp_path: Path) -> None:
    run_to(Sick(), tmp_path, 2, max_steps=4)
    with pytest.raises(UserError, match="--resume"):
        trainer(Sick(), tmp_path, max_steps=4).start()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        trainer(Sick(), tmp_path / "new", max_steps=4, resume=True).start()
    assert not (tmp_path / "new").exists()


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'max_steps'"):
        trainer(Sick(), tmp_path, max_step=4)


def test_ema_is_what_gets_exported(tmp_path: Path) -> None:
    teacher = Teacher.from_module(TimeMLP(2), laws.process(), "v_prediction", shape=(2,))
    run = trainer(Sick(), tmp_path, teacher, max_steps=4, ema_decay=0.9, warmup_steps=0)
    exported = dict(run.train().named_parameters())
    ema, student = tensors_of(tmp_path)["ema"], tensors_of(tmp_path)["role.student"]
    assert exported.keys() == student.keys()
    for i, (name, value) in enumerate(exported.items()):
        assert torch.equal(value, ema[str(i)])
        assert not torch.equal(value, student[name])
    assert run.result["export_max_abs_diff"] < 1e-5
