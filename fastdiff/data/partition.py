"""``Partition``: the prompts of a run divided over K students, every prompt to exactly one, all parts about equally large.

    by_class      consecutive classes, cut where the parts come out most equal                      (ImageNet in the paper)
    by_clusters   k-means on the conditions, then assignment under a capacity of N / K prompts      (text)
    by_function   whatever ``prompt -> student`` says

Under a capacity the prompts with the widest margin between their nearest and second nearest centroid choose first. A prompt that
is not in the list goes to the nearest centroid, where there are centroids. The paper divides text by signs of the pooled embedding
(recalled); clusters on the mean of the text states over tokens are this library's choice.
Song et al., Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.data.prompts import PromptTable
from fastdiff.errors import UserError
from fastdiff.files import aside
from fastdiff.models.teacher import Teacher

MAX_RATIO = 1.1


@dataclass(frozen=True, eq=False)
class Partition:
    """``part[i]`` is the student of ``prompts[i]``; ``centroids`` [K, d] are there for clusters only.

    Raises:
        UserError: a prompt is there twice, a part is empty, or a student's number is out of range.
    """

    prompts: tuple[str, ...]
    part: tuple[int, ...]
    students: int
    centroids: Tensor | None = None

    def __post_init__(self) -> None:
        twice = [prompt for prompt, n in Counter(self.prompts).items() if n > 1]
        if twice:
            raise UserError(f"{twice[0]!r} is in the list of prompts more than once: two students could claim it. Leave one.")
        if len(self.part) != len(self.prompts) or set(self.part) != set(range(self.students)):
            raise UserError(
                f"{len(self.prompts)} prompts with {len(self.part)} numbers of students, which are {sorted(set(self.part))}: each "
                f"of 0..{self.students - 1} must have a prompt, or a student would train on nothing."
            )

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def by_class(
        cls, prompts: Sequence[str], students: int, *, label: Callable[[str], Any] = str, max_ratio: float = MAX_RATIO
    ) -> "Partition":
        """Blocks of consecutive classes; classes are consecutive in the order in which the prompts bring them.

        Args:
            label: the class of a prompt; by default every prompt is its own.
            max_ratio: of the largest to the smallest part.

        Raises:
            UserError: fewer classes than students, or no cut between classes keeps ``max_ratio``.
        """
        labels = [label(prompt) for prompt in prompts]
        sizes = Counter(labels)
        if students > len(sizes):
            raise UserError(f"{students} students and {len(sizes)} classes: a class is not divided. Ask for fewer students.")
        part_of = dict(zip(sizes, _blocks(list(sizes.values()), students), strict=True))
        return cls(tuple(prompts), tuple(part_of[key] for key in labels), students)._balanced(max_ratio)

    @classmethod
    def by_clusters(cls, prompts: Sequence[str], students: int, teacher: Teacher, *, seed: int = 0) -> "Partition":
        """Balanced clusters of the prompts' conditions; sizes differ by one at most."""
        table = PromptTable(list(prompts), teacher)
        chunks = torch.arange(len(prompts)).split(256)
        points = torch.cat([pooled(table.conditions(chunk)) for chunk in chunks]).cpu()
        part, centroids = balanced_clusters(points, students, seed=seed)
        return cls(tuple(prompts), tuple(part.tolist()), students, centroids)

    @classmethod
    def by_function(
        cls, prompts: Sequence[str], students: int, route: Callable[[str], int], *, max_ratio: float = MAX_RATIO
    ) -> "Partition":
        """What a function says; it is asked once and its answers are stored, so that no code has to travel with them."""
        return cls(tuple(prompts), tuple(int(route(prompt)) for prompt in prompts), students)._balanced(max_ratio)

    def _balanced(self, max_ratio: float) -> "Partition":
        if max(self.sizes) > max_ratio * min(self.sizes) and max(self.sizes) - min(self.sizes) > 1:
            raise UserError(
                f"parts of {self.sizes} prompts: the largest is more than {max_ratio} times the smallest, and its student would "
                "learn less about each prompt. Choose another number of students, or raise max_ratio."
            )
        return self

    # --- asking it --------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> list[int]:
        """Prompts of each student."""
        counts = Counter(self.part)
        return [counts[k] for k in range(self.students)]

    def rows(self, student: int) -> list[int]:
        """The rows of ``prompts`` that are ``student``'s."""
        return [i for i, k in enumerate(self.part) if k == student]

    @cached_property
    def _student_of(self) -> dict[str, int]:
        return {"": 0, **dict(zip(self.prompts, self.part, strict=True))}

    def route(self, prompts: Sequence[str], teacher: Teacher | None = None) -> Tensor:
        """The student of each prompt [B]; the empty prompt is of all parts, and the first student answers it.

        Raises:
            UserError: a prompt is not in the list and there are no centroids, or no teacher to encode it.
        """
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._student_of]
        if unseen and (self.centroids is None or teacher is None):
            raise UserError(
                f"no student for {unseen[0]!r}: it is none of the {len(self.prompts)} prompts that were divided. Only clusters "
                "route others, and need the teacher for it."
            )
        found = dict(self._student_of)
        if unseen and teacher is not None and self.centroids is not None:
            nearest = torch.cdist(pooled(teacher.encode(unseen)).cpu(), self.centroids).argmin(1)
            found |= dict(zip(unseen, nearest.tolist(), strict=True))
        return torch.tensor([found[prompt] for prompt in prompts])

    def hash(self) -> str:
        """SHA-256 of prompts, parts and centroids."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.part, self.students]).encode())
        if self.centroids is not None:
            digest.update(self.centroids.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write ``partition.json`` and, for clusters, ``partition.safetensors``."""
        record = {"students": self.students, "prompts": self.prompts, "part": self.part, "hash": self.hash()}
        if self.centroids is not None:
            with aside(folder / "partition.safetensors") as path:
                save_file({"centroids": self.centroids.contiguous()}, path)
        with aside(folder / "partition.json") as path:
            path.write_text(json.dumps(record, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Partition":
        """Read what ``save`` wrote.

        Raises:
            UserError: a file is missing or damaged, or they do not belong together.
        """
        tensors = folder / "partition.safetensors"
        try:
            record = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
            centroids = load_file(tensors)["centroids"] if tensors.is_file() else None
            found = cls(tuple(record["prompts"]), tuple(record["part"]), record["students"], centroids)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"no partition in {folder}: {error!r}. Copy the folder again, with partition.* in it.") from error
        if found.hash() != record["hash"]:
            raise UserError(f"the partition in {folder} is not what was saved: prompts would go to students that never saw them.")
        return found


def pooled(cond: Any) -> Tensor:
    """A condition as one vector a prompt [B, d], float32: states [B, L, d] are averaged over the L tokens.

    Raises:
        UserError: labels, or a dict of several conditions: there is no distance between those.
    """
    if not isinstance(cond, Tensor) or not cond.is_floating_point() or cond.ndim not in {2, 3}:
        raise UserError("these conditions are no vectors or text states, so prompts cannot be clustered by them: divide by class.")
    return cond.float().mean(1) if cond.ndim == 3 else cond.float()


def balanced_clusters(points: Tensor, k: int, *, seed: int = 0, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """k-means whose every assignment respects the capacity: parts [N] of sizes floor or ceil of N / k, centroids [k, d].

    Starts from k-means++ and stops where the assignment repeats itself, or after ``iterations``.
    """
    if not 1 <= k <= len(points):
        raise UserError(f"{k} students for {len(points)} prompts: each needs at least one.")
    centroids = _spread_out(points, k, torch.Generator().manual_seed(seed))
    part = torch.full((len(points),), -1)
    for _ in range(iterations):
        new = assign(torch.cdist(points, centroids))
        if torch.equal(new, part):
            break
        part = new
        centroids = torch.stack([points[part == j].mean(0) for j in range(k)])
    return part, centroids


def _spread_out(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points, each drawn with the square of its distance to those before (k-means++)."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < k:
        weight = torch.cdist(points, points[chosen]).amin(1).square()
        weight = weight if weight.sum() > 0 else torch.ones_like(weight)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return points[chosen]


def assign(distance: Tensor) -> Tensor:
    """The part of each row of ``distance`` [N, k]: the nearest one with room, those with the widest margin first.

    N mod k parts may take ceil(N / k), the others floor(N / k).
    """
    n, k = distance.shape
    order = distance.argsort(1)
    ranked = distance.gather(1, order)
    margin = ranked[:, min(1, k - 1)] - ranked[:, 0]
    taken, base, larger = [0] * k, n // k, n % k
    part = torch.empty(n, dtype=torch.long)
    for i in margin.argsort(descending=True, stable=True).tolist():
        j = next(j for j in order[i].tolist() if taken[j] < base or (taken[j] == base and larger))
        larger -= taken[j] == base
        taken[j] += 1
        part[i] = j
    return part


def _blocks(sizes: list[int], k: int) -> list[int]:
    """The block of each class: k blocks, none empty, cut where the running total is nearest to the equal shares."""
    total, ends, reached = sum(sizes), [0], [0]
    for size in sizes:
        reached.append(reached[-1] + size)
    for j in range(1, k):
        candidates = range(ends[-1] + 1, len(sizes) - (k - j) + 1)
        ends.append(min(candidates, key=lambda end: abs(reached[end] - j * total / k)))
    ends.append(len(sizes))
    return [j for j in range(k) for _ in range(ends[j], ends[j + 1])]
