"""Partitions: exact cover, balance, what they store."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_teacher

from fastdiff.data.fashion import GARMENTS, captions, parse
from fastdiff.data.partition import Partition, assign, balanced_clusters, pooled
from fastdiff.errors import UserError

PROMPTS = captions()[::7]  # 80


def blobs(sizes: list[int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return torch.cat([c + 0.1 * torch.randn(n, 2, generator=generator) for c, n in zip(centres, sizes, strict=True)])


def made() -> dict[str, Partition]:
    return {
        "class": Partition.by_class(PROMPTS, 5, label=lambda prompt: parse(prompt).garment),
        "clusters": Partition.by_clusters(PROMPTS, 3, tiny_teacher()),
        "function": Partition.by_function(PROMPTS, 2, lambda prompt: PROMPTS.index(prompt) % 2),
    }


@pytest.mark.parametrize("how", ["class", "clusters", "function"])
def test_every_prompt_has_exactly_one_student_and_sizes_are_nearly_equal(how: str) -> None:
    partition = made()[how]
    rows = [row for k in range(partition.students) for row in partition.rows(k)]
    assert sorted(rows) == list(range(len(PROMPTS)))
    assert max(partition.sizes) <= 1.1 * min(partition.sizes)
    assert sum(partition.sizes) == len(PROMPTS)
    assert partition.route(PROMPTS).tolist() == list(partition.part)


def test_classes_are_consecutive_and_never_divided() -> None:
    partition = Partition.by_class(captions(), 5, label=lambda prompt: parse(prompt).garment)
    student_of = {
        g: {k for p, k in zip(partition.prompts, partition.part, strict=True) if parse(p).garment == g} for g in range(10)
    }
    assert len(GARMENTS) == 10
    assert student_of == {g: {g // 2} for g in range(10)}


def test_blocks_are_cut_where_the_prompts_are_divided_most_equally() -> None:
    """Classes of 5, 1, 1, 1, 4 prompts: the half of 12 is after the second class."""
    labels = [0] * 5 + [1] + [2] + [3] + [4] * 4
    prompts = [f"{label} {i}" for i, label in enumerate(labels)]
    assert Partition.by_class(prompts, 2, label=lambda prompt: prompt[0]).sizes == [6, 6]


def test_unequal_parts_are_refused_unless_asked_for() -> None:
    with pytest.raises(UserError, match="max_ratio"):
        Partition.by_function(PROMPTS, 2, lambda prompt: int(PROMPTS.index(prompt) < 20))
    assert Partition.by_function(PROMPTS, 2, lambda p: int(PROMPTS.index(p) < 20), max_ratio=3.0).sizes == [60, 20]


@pytest.mark.parametrize(("n", "k"), [(80, 3), (10, 4), (7, 7), (9, 1)])
def test_clusters_differ_by_one_prompt_at_most(n: int, k: int) -> None:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    part, centroids = balanced_clusters(points, k)
    counts = torch.bincount(part, minlength=k)
    assert counts.sum() == n
    assert counts.max() - counts.min() == (0 if n % k == 0 else 1)
    assert all(torch.allclose(centroids[j], points[part == j].mean(0)) for j in range(k))


@pytest.mark.parametrize("seed", range(5))
def test_separate_blobs_of_equal_size_are_found(seed: int) -> None:
    part, centroids = balanced_clusters(blobs([20] * 4, seed), 4, seed=seed)
    groups = [set(part[i * 20 : (i + 1) * 20].tolist()) for i in range(4)]
    assert sorted(map(len, groups)) == [1, 1, 1, 1]
    assert set.union(*groups) == {0, 1, 2, 3}
    means = blobs([20] * 4, seed).view(4, 20, 2).mean(1)
    assert torch.cdist(means, centroids).amin(1).max() < 1e-5


def test_under_a_capacity_the_widest_margins_choose_first() -> None:
    """All three are nearest to part 0, which has room for two: the one with the least to lose leaves."""
    distance = torch.tensor([[0.0, 5.0], [0.0, 0.1], [0.0, 3.0], [9.0, 1.0]])
    assert assign(distance).tolist() == [0, 1, 0, 1]


def test_an_unknown_prompt_goes_to_the_nearest_centroid() -> None:
    teacher = tiny_teacher()
    partition = Partition.by_clusters(PROMPTS, 3, teacher)
    others = [prompt for prompt in captions() if prompt not in PROMPTS][:20]
    assert partition.centroids is not None
    distance = torch.stack([(pooled(teacher.encode([p])) - partition.centroids).norm(dim=1) for p in others])
    assert partition.route(others, teacher).tolist() == distance.argmin(1).tolist()
    with pytest.raises(UserError, match="no student"):
        Partition.by_class(PROMPTS, 5).route(others, teacher)


def test_text_states_are_averaged_over_tokens_and_labels_are_refused() -> None:
    states = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(pooled(states), torch.tensor([[4.0, 5.0, 6.0, 7.0]]))
    with pytest.raises(UserError, match="by class"):
        pooled(torch.tensor([1, 2]))


@pytest.mark.parametrize("how", ["class", "clusters", "function"])
def test_a_partition_is_read_back_as_it_was(how: str, tmp_path: Path) -> None:
    partition = made()[how]
    partition.save(tmp_path)
    again = Partition.load(tmp_path)
    assert again.hash() == partition.hash()
    assert (again.prompts, again.part, again.students) == (partition.prompts, partition.part, partition.students)
    assert (tmp_path / "partition.safetensors").exists() == (how == "clusters")


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    made()["class"].save(tmp_path)
    record = json.loads((tmp_path / "partition.json").read_text())
    record["part"][0], record["part"][-1] = record["part"][-1], record["part"][0]
    (tmp_path / "partition.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not what was saved"):
        Partition.load(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "part", "students"), [(["a", "a"], [0, 1], 2), (["a", "b"], [0, 0], 2), (["a", "b"], [0, 2], 2), (["a"], [0, 0], 1)]
)
def test_what_is_no_partition_is_refused(prompts: list[str], part: list[int], students: int) -> None:
    with pytest.raises(UserError):
        Partition(tuple(prompts), tuple(part), students)


def test_more_students_than_classes_or_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="classes"):
        Partition.by_class(["a", "b"], 3)
    with pytest.raises(UserError, match="at least one"):
        balanced_clusters(torch.zeros(2, 2), 3)
