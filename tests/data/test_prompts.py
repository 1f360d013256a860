"""Prompts of a run."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline, tiny_teacher

from fastdiff.data.fashion import captions
from fastdiff.data.prompts import PromptTable, cycled, read_prompts
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher()


def test_sources(teacher: Teacher, tmp_path: Path) -> None:
    assert read_prompts(None, teacher) == captions()
    assert read_prompts(("a", "b"), teacher) == ["a", "b"]
    file = tmp_path / "prompts.txt"
    file.write_text("  a bag \n\n\tein grüner Stiefel\r\na bag\n", encoding="utf-8")
    for source in (file, str(file)):
        assert read_prompts(source, teacher) == ["a bag", "ein grüner Stiefel", "a bag"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a bag\na coat\n", encoding="utf-8-sig")
    assert read_prompts(file, teacher) == ["a bag", "a coat"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot read"), (b"", "no prompts in"), (b" \n\n\t\n", "no prompts in"), (b"\xff\xfe\x00\x80abc", "UTF-8")],
    ids=["missing", "empty", "blank", "binary"],
)
def test_a_bad_prompts_file_is_named(teacher: Teacher, tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_prompts(file, teacher)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_and_an_empty_list_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path, teacher)
    with pytest.raises(UserError, match="no prompts"):
        read_prompts([], teacher)


def test_another_teacher_must_be_given_prompts() -> None:
    with pytest.raises(UserError, match="other brings none"):
        read_prompts(None, Teacher(tiny_pipeline(), name="other"))


def test_a_folder_that_happens_to_be_called_fashion_has_no_captions_of_its_own(tmp_path: Path) -> None:
    """Its student would be trained on captions that its text encoder has never seen."""
    tiny_pipeline().save_pretrained(tmp_path / "fashion")
    stranger = Teacher.from_pretrained(tmp_path / "fashion")
    with pytest.raises(UserError, match="brings none"):
        read_prompts(None, stranger)


@pytest.mark.parametrize("count", [3, 300])
def test_cached_conditions_equal_those_encoded_batch_by_batch(teacher: Teacher, count: int) -> None:
    prompts = captions()[:count]
    cached, live = PromptTable(prompts, teacher), PromptTable(prompts, teacher, cached=count - 1)
    assert len(cached) == len(live) == count
    index = torch.tensor([2, 0, count - 1, 2])
    torch.testing.assert_close(cached.conditions(index), live.conditions(index), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cached.conditions(index), teacher.encode([prompts[i] for i in index]), rtol=1e-5, atol=1e-6)


def test_cycled_gives_every_index_equally_often() -> None:
    index = cycled(7, 24, torch.Generator().manual_seed(0))
    counts = torch.bincount(index, minlength=7)
    assert len(index) == 24
    assert counts.max() - counts.min() <= 1
    assert sorted(index[:7].tolist()) == list(range(7))
    assert torch.equal(index, cycled(7, 24, torch.Generator().manual_seed(0)))
    assert not torch.equal(index[:7], index[7:14])
