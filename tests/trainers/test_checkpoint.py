"""Checkpoints: back to the bit, or an error that says what to do."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff.errors import UserError
from fastdiff.trainers import checkpoint


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)


def simple(folder: Path, step: int, *, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, {"seconds": 1.5}, {"role.student": {"w": torch.full((3,), float(step))}}, keep=keep)


# --- to the bit


def test_weights_buffers_and_optimizer_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight = network()
    steps(straight, optimizer := adamw(straight), 0, 4)
    path = checkpoint.save(
        tmp_path,
        4,
        {"health": {"total": 1}},
        {"role.student": straight.state_dict(), "optimizer.student": checkpoint.optimizer_tensors(optimizer)},
        keep=2,
    )
    steps(straight, optimizer, 4, 9)

    resumed = network()
    second = adamw(resumed)
    state, tensors = checkpoint.load(path)
    resumed.load_state_dict(tensors["role.student"])
    checkpoint.load_optimizer(second, tensors["optimizer.student"])
    steps(resumed, second, 4, 9)
    assert state == {"health": {"total": 1}, "step": 4}
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert resumed.state_dict()[name].dtype == value.dtype
    ours, theirs = second.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, entry in theirs.items():
        assert entry.keys() == ours[index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[index][name], value) for name, value in entry.items())
    assert second.param_groups[0]["betas"] == (0.8, 0.95)


def test_without_the_optimizer_the_runs_part(tmp_path: Path) -> None:
    """What the test above would not see if loading did nothing."""
    straight, resumed = network(), network()
    steps(straight, optimizer := adamw(straight), 0, 4)
    resumed.load_state_dict(straight.state_dict())
    steps(straight, optimizer, 4, 9)
    steps(resumed, adamw(resumed), 4, 9)
    assert not torch.equal(resumed[0].weight, straight[0].weight)


def test_an_optimizer_that_never_stepped_is_saved_too(tmp_path: Path) -> None:
    """The fake score during a warm start."""
    optimizer = adamw(network())
    path = checkpoint.save(tmp_path, 1, {}, {"optimizer.fake": checkpoint.optimizer_tensors(optimizer)}, keep=1)
    _, tensors = checkpoint.load(path)
    checkpoint.load_optimizer(optimizer, tensors["optimizer.fake"])
    assert optimizer.state_dict()["state"] == {}


def test_dtypes_shared_memory_views_and_scalars_survive(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    values = {
        "whole": base,
        "view": base[::2],
        "transposed": torch.arange(6).reshape(2, 3).T,
        "bf16": torch.tensor([1.0, -2.0]).bfloat16(),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "scalar": torch.tensor(7),
        "grown": nn.Parameter(torch.ones(2)),
    }
    _, tensors = checkpoint.load(checkpoint.save(tmp_path, 3, {}, {"role.x": values}, keep=1))
    assert tensors["role.x"].keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(tensors["role.x"][name], value), name
        assert tensors["role.x"][name].dtype == value.dtype


# --- which ones stay


def test_the_last_two_stay_and_the_newest_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    for step in (5, 10, 100, 1000):
        simple(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    state, tensors = checkpoint.load(newest)
    assert state["step"] == 1000
    assert tensors["role.student"]["w"].tolist() == [1000.0] * 3


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path) -> None:
    simple(tmp_path, 5)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".step-00000007.part").mkdir()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000005"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    simple(tmp_path, 5)
    checkpoint.save(tmp_path, 5, {"again": True}, {"role.other": {"w": torch.zeros(1)}}, keep=2)
    state, tensors = checkpoint.load(tmp_path / "step-00000005")
    assert state["again"] is True
    assert set(tensors) == {"role.other"}


# --- a full disk and damaged files


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    simple(tmp_path, 5)
    calls, original = [], checkpoint.save_file

    def full(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == failing_call:
            Path(path).write_bytes(b"half of a file")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    roles = {name: {"w": torch.ones(2)} for name in ("role.student", "role.fake")}
    with pytest.raises(UserError, match="No space left") as caught:
        checkpoint.save(tmp_path, 10, {}, roles, keep=1)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "step-00000005")[0]["step"] == 5


def test_a_full_disk_while_replacing_a_step_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path, 5)

    def full(tensors: dict, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError):
        simple(tmp_path, 5)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "step-00000005")[1]["role.student"]["w"].tolist() == [5.0] * 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        simple(tmp_path / "file", 5)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", ["role.student.safetensors", "state.json"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, name: str, keep: float) -> None:
    path = simple(tmp_path, 5)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"damaged.*Delete that folder") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_damage_too(tmp_path: Path) -> None:
    """A copy that left out one role must not surface as a KeyError, or as a run without its average."""
    roles = {name: {"w": torch.ones(2)} for name in ("role.student", "ema")}
    path = checkpoint.save(tmp_path, 5, {}, roles, keep=1)
    (path / "ema.safetensors").unlink()
    with pytest.raises(UserError, match="ema"):
        checkpoint.load(path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = simple(tmp_path, 5)
    assert sorted(p.name for p in path.iterdir()) == ["role.student.safetensors", "state.json"]
    assert json.loads((path / "state.json").read_text()).items() >= {"seconds": 1.5, "step": 5}.items()
