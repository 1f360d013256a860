"""Merged students: endpoints to the bit, the middle by hand, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import trainer
from tiny import tiny_teacher

from fastdiff.errors import UserError
from fastdiff.pipelines.merge import merge, merge_students
from fastdiff.trainers import SwiftBrushV2

NETWORK = Path("unet") / "diffusion_pytorch_model.safetensors"


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in (("a", (3, 4)), ("b", (5,)))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_ends_are_the_students_to_the_bit_and_the_middle_is_between(dtype: torch.dtype) -> None:
    first, second = weights(0, dtype), weights(1, dtype)
    for share, end in ((1.0, first), (0.0, second)):
        assert all(torch.equal(value, end[key]) for key, value in merge(first, second, share).items())
    for key, value in merge(first, second, 0.3).items():
        assert value.dtype == dtype
        want = 0.3 * first[key].double() + 0.7 * second[key].double()
        torch.testing.assert_close(value.double(), want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_weights_that_do_not_fit_are_refused() -> None:
    first = weights(0)
    with pytest.raises(UserError, match="such as b"):
        merge(first, {"a": first["a"]}, 0.5)
    with pytest.raises(UserError, match="such as a"):
        merge(first, {**first, "a": first["a"][:2]}, 0.5)
    with pytest.raises(UserError, match=r"share is 1\.5"):
        merge(first, first, 1.5)
    counted = {"n": torch.tensor([3])}
    assert torch.equal(merge(counted, counted, 0.5)["n"], counted["n"])
    with pytest.raises(UserError, match="n holds integers that differ"):
        merge(counted, {"n": torch.tensor([4])}, 0.5)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A full student and a LoRA one of the same teacher."""
    folder = tmp_path_factory.mktemp("students")
    tiny = {"clip_weight": 0.0, "rank": 4, "student_rank": 4, "lr": 1e-2}
    for kind in ("full", "lora"):
        trainer(SwiftBrushV2(student=kind, **tiny), folder / kind, max_steps=2).train()
    return folder / "full", folder / "lora"


def test_a_merged_folder_is_a_pipeline_of_one_call_with_weights_between(students: tuple[Path, Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    first, second = students
    merge_students(first, second, tmp_path / "merged", 0.25)
    a, b, got = (load_file(folder / NETWORK) for folder in (first, second, tmp_path / "merged"))
    moved = [key for key in a if not torch.equal(a[key], b[key])]
    assert moved
    for key, value in got.items():
        torch.testing.assert_close(value, 0.25 * a[key] + 0.75 * b[key], rtol=1e-5, atol=1e-6)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "merged", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    pipeline("a red boot on a white background")
    assert calls == [1]
    note = json.loads((tmp_path / "merged" / "fastdiff.json").read_text())
    assert note["merged"]["share"] == 0.25
    assert (note["merged"]["first"]["student"], note["merged"]["second"]["student"]) == ("full", "lora")
    left = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "negative_prompt.py" in left  # the card names it
    assert not left & {"checkpoints", "validation", "log.csv"}
    with pytest.raises(UserError, match="exists"):
        merge_students(first, second, tmp_path / "merged", 0.25)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_folder_at_an_end_has_that_students_network(share: float, students: tuple[Path, Path], tmp_path: Path) -> None:
    merge_students(*students, tmp_path / "end", share)
    got, want = load_file(tmp_path / "end" / NETWORK), load_file(students[0 if share == 1 else 1] / NETWORK)
    assert got.keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in got.items())


def test_students_of_two_teachers_have_nothing_between_them(students: tuple[Path, Path], tmp_path: Path) -> None:
    other = trainer(SwiftBrushV2(clip_weight=0.0, rank=4), tmp_path / "other", tiny_teacher(seed=1), max_steps=1)
    other.train()
    with pytest.raises(UserError, match="teacher_hash"):
        merge_students(students[0], tmp_path / "other", tmp_path / "merged")
    with pytest.raises(UserError, match=r"no fastdiff\.json"):
        merge_students(students[0], tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
