"""The engine's contract, on every method it has: routing, resume, accumulation, ranks, health, interrupt."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import tiny_teacher
from torch import Tensor

from fastdiff import Trainer
from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers import DMD2, ODEPairs, SwiftBrush, checkpoint
from fastdiff.trainers.method import Batch, Method, Paper, one_step

PAIRS = {"pairs": 12, "pair_steps": 2}
METHODS = [
    ODEPairs(**PAIRS),
    SwiftBrush(rank=4),
    SwiftBrush(rank=4, warm_start_steps=2, **PAIRS),
    DMD2(ratio=(1, 3)),
    DMD2(ratio=(2, 3), fake_score="lora", rank=4, gan_weight=1e-3, **PAIRS),
]
IDS = ["ode-pairs", "swiftbrush", "swiftbrush-warm", "dmd2", "dmd2-lora-gan"]
OPTIONS = {"batch_size": 4, "validate_every": 0, "warmup_steps": 2, "log_every": 1}


def trainer(method: Method, folder: Path, **options: object) -> Trainer:
    return Trainer(method, tiny_teacher(), output_dir=folder, **{**OPTIONS, **options})


def run_to(method: Method, folder: Path, stop: int, **options: object) -> Trainer:
    """A run of ``max_steps`` that is cut off after ``stop`` iterations with a checkpoint."""
    run = trainer(method, folder, **options)
    run.start()
    while run._step < stop:
        run.advance()
    run._save()
    run.close()
    return run


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return checkpoint.load(checkpoint.latest(folder / "checkpoints"))[1]


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_resumed_run_equals_straight_run_to_the_bit(method: Method, tmp_path: Path) -> None:
    run_to(method, tmp_path / "straight", 7, max_steps=7)
    run_to(method, tmp_path / "resumed", 4, max_steps=7)
    run_to(method, tmp_path / "resumed", 7, max_steps=7, resume=True)
    straight, resumed = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    for name, values in straight.items():
        assert values.keys() == resumed[name].keys()
        for key, value in values.items():
            assert torch.equal(value, resumed[name][key]), f"{name} {key}"


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_an_update_gives_gradient_to_its_roles_and_to_nothing_else(method: Method, tmp_path: Path) -> None:
    run = trainer(method, tmp_path, max_steps=9)
    run.start()
    teacher_before = run.teacher.weights_hash()
    for step in range(7):
        run._step = step
        batches = run._micro_batches(step)
        for update in method.updates(step):
            run._backward(update, batches, method.trains(update))
            for name in run._optimizers:
                gradients = [p.grad for p in run._roles.parameters(name)]
                if name in method.trains(update):
                    assert any(g is not None for g in gradients), f"{name} got no gradient in {update}"
                else:
                    assert all(g is None for g in gradients), f"{update} leaked gradient into {name}"
            own = [p for n, p in run.teacher.family.backbone.named_parameters() if ".lora_" not in n]
            assert all(p.grad is None and not p.requires_grad for p in own)
            for optimizer in run._optimizers.values():
                optimizer.zero_grad()
    run.close()
    assert run.teacher.weights_hash() == teacher_before


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_updates_change_only_what_they_train(method: Method, tmp_path: Path) -> None:
    run = trainer(method, tmp_path, max_steps=9, warmup_steps=0)
    run.start()
    before_teacher = run.teacher.weights_hash()
    for step in range(4):
        before = {n: {k: v.clone() for k, v in run._roles.state(n).items()} for n in run._optimizers}
        trained = {name for update in method.updates(step) for name in method.trains(update)}
        run.advance()
        for name, values in before.items():
            same = all(torch.equal(v, run._roles.state(name)[k]) for k, v in values.items())
            if name not in trained:
                assert same, f"step {step} changed {name}"
    changed = {n for n, v in before.items() if not all(torch.equal(v[k], run._roles.state(n)[k]) for k in v)}
    assert changed
    run.close()
    assert run.teacher.weights_hash() == before_teacher


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks and noise in float64: in float32 the difference of two guided scores keeps only four or five digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_accumulation_4x1_gives_the_gradient_of_1x4(method: Method, tmp_path: Path) -> None:
    def gradients(batch_size: int, accumulation: int) -> dict[str, list[Tensor]]:
        run = trainer(method, tmp_path / f"{batch_size}", max_steps=9, batch_size=batch_size, accumulation=accumulation)
        run.start()
        for parameters in (run._roles.parameters(n) for n in run._optimizers):  # off the fixed point fake = teacher
            generator = torch.Generator().manual_seed(1)
            for p in parameters:
                p.data += 0.02 * torch.randn(p.shape, generator=generator)
        found = {}
        for step in (0, 3):
            batches = run._micro_batches(step)
            for update in method.updates(step):
                run._backward(update, batches, method.trains(update))
                for name in method.trains(update):
                    found[f"{step} {update} {name}"] = [p.grad.clone() for p in run._roles.parameters(name) if p.grad is not None]
                for optimizer in run._optimizers.values():
                    optimizer.zero_grad()
        run.close()
        return found

    whole, parts = gradients(4, 1), gradients(1, 4)
    assert whole.keys() == parts.keys()
    for key in whole:
        a, b = (torch.cat([g.flatten() for g in side[key]]) for side in (whole, parts))
        assert a.norm() > 0
        assert (a - b).norm() <= 1e-6 * a.norm(), key


LEDGERS = [
    {"student": 4},
    {"student": 4, "teacher": 8, "fake_score": 8 + 4},
    {"student": 4, "teacher": 8, "fake_score": 8 + 4},
    {"student": 4, "teacher": 8, "fake_score": 4 + 4},
    {"student": 4, "teacher": 8, "fake_score": 4 + 4 + 4 + 2 * 4},
]


@pytest.mark.parametrize(("method", "expected"), list(zip(METHODS, LEDGERS, strict=True)), ids=IDS)
def test_the_ledger_of_a_full_iteration(method: Method, expected: dict[str, int], tmp_path: Path) -> None:
    run = trainer(method, tmp_path, max_steps=9)
    run.start()
    run._step = getattr(method, "warm_start_steps", 0)
    run._roles.ledger.clear()
    run.advance()
    assert dict(run._roles.ledger) == expected
    run.close()


@pytest.mark.parametrize("method", [SwiftBrush(guidance_scale=1.0, rank=4), DMD2(guidance_scale=1.0)], ids=["swiftbrush", "dmd2"])
def test_nobody_runs_the_null_prompt_at_guidance_one(method: Method, tmp_path: Path) -> None:
    run = trainer(method, tmp_path, max_steps=9)
    run.start()
    run.advance()
    assert run._roles.ledger["teacher"] == 4
    assert run._roles.ledger["fake_score"] == 8
    run.close()


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_field_of_a_method_is_read(method: Method, tmp_path: Path) -> None:
    read: set[str] = set()

    class Spy(type(method)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    everything_on = {"warm_start_steps": 1, "gan_weight": 1e-3, "fake_score": "lora", **PAIRS, "rank": 4}
    fields = {f.name for f in dataclasses.fields(method)}
    spied = Spy(**{k: v for k, v in everything_on.items() if k in fields})
    run = trainer(spied, tmp_path, max_steps=9, save_every=99)
    run.start()
    read.clear()
    spied.roles()
    spied.prepare(_preparation(run))
    for _ in range(3):
        run.advance()
    run.close()
    assert fields <= read, f"never read: {fields - read}"


def _preparation(run: Trainer) -> object:
    from fastdiff.trainers.method import Preparation

    (run.folder / "again").mkdir()
    return Preparation(run.teacher, run.prompts, run.folder / "again", 1, 0, 1, lambda label, total: lambda done: None)


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


def test_bf16_autocast_stays_near_float32(tmp_path: Path) -> None:
    terms = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()  # accelerate allows one precision a process
        run = trainer(ODEPairs(**PAIRS), tmp_path / precision, max_steps=4, mixed_precision=precision)
        run.start()
        terms[precision] = run._backward("regression", run._micro_batches(0), ("student",))["regression"]
        assert terms[precision].dtype == torch.float32
        run.advance()
        run.close()
    AcceleratorState._reset_state()
    assert abs(terms["bf16"] - terms["no"]) < 0.05 * terms["no"]
    assert terms["bf16"] != terms["no"]


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
    run = trainer(ODEPairs(**PAIRS), tmp_path, max_steps=4, ema_decay=0.9, warmup_steps=0)
    pipeline = run.train()
    ema = tensors_of(tmp_path)["ema"]
    names = list(load_file(tmp_path / "checkpoints" / "step-00000004" / "role.student.safetensors"))
    exported = dict(pipeline.unet.named_parameters())
    student = tensors_of(tmp_path)["role.student"]
    ordered = [name for name, _ in run._roles.modules["student"].named_parameters()]
    assert set(ordered) <= set(names)
    for i, name in enumerate(ordered):
        assert torch.equal(exported[name], ema[str(i)])
    assert any(not torch.equal(student[name], exported[name]) for name in ordered)
    assert run.result["export_max_abs_diff"] < 1e-5


def _rank(index: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    run = trainer(SwiftBrush(rank=4), Path(folder), max_steps=4, warmup_steps=0)
    run.start()
    noise = run._micro_batches(0)[0].noise("z")
    for _ in range(3):
        run.advance()
    weights = torch.cat([p.detach().flatten() for n in run._optimizers for p in run._roles.parameters(n)])
    torch.save({"weights": weights, "noise": noise, "world": run.accelerator.num_processes}, f"{folder}/rank-{index}.pt")
    run.close()


def test_two_ranks_stay_equal_and_draw_different_noise(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"rank-{i}.pt", weights_only=True) for i in range(2))
    assert a["world"] == b["world"] == 2
    assert torch.equal(a["weights"], b["weights"])
    assert not torch.equal(a["noise"], b["noise"])
