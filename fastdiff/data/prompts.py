"""Prompts of a run: from a list, a text file (one a line) or the bundled world."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.fashion import captions
from fastdiff.errors import UserError
from fastdiff.models.condition import concat, size_in_bytes, take
from fastdiff.models.teacher import BUNDLED, Teacher


def read_prompts(source: str | Path | Sequence[str] | None, teacher: Teacher) -> list[str]:
    """The prompts of ``source``; None means the captions of the bundled world, for its own teachers only.

    Raises:
        UserError: no such file, nothing in it, or None for a teacher that has no prompts of its own.
    """
    if source is None and teacher.prompts is not None:
        return teacher.prompts
    if source is None:
        if teacher.name not in BUNDLED:
            raise UserError(
                f"no prompts: the teacher {teacher.name} brings none. Pass prompts, a text file with one prompt a line."
            )
        return captions()
    if not isinstance(source, str | Path):
        prompts = list(source)
    else:
        try:
            prompts = [line.strip() for line in Path(source).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the prompts file {source}: {error}. Pass a UTF-8 text file, one prompt a line."
            ) from error
    if not prompts:
        raise UserError(f"no prompts in {source}: there is nothing to learn from. Write one prompt a line.")
    return prompts


class PromptTable:
    """Prompts with their conditions; up to ``cached`` prompts are encoded once, more are encoded batch by batch.

    ``part`` are the rows that a batch draws its conditions from, where that is not all of them.
    """

    def __init__(self, prompts: list[str], teacher: Teacher, *, part: Sequence[int] | None = None, cached: int = 8192) -> None:
        self.prompts, self.teacher, self._table = prompts, teacher, None
        self.part = None if part is None else torch.tensor(list(part), dtype=torch.long)
        if self.part is not None and not (len(self.part) and self.part.min() >= 0 and self.part.max() < len(prompts)):
            raise UserError(f"the part {list(part or ())[:8]} is no set of rows of {len(prompts)} prompts: nothing could be drawn.")
        if len(prompts) <= cached:
            chunks = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
            self._table = concat(*(teacher.encode(chunk) for chunk in chunks))

    def __len__(self) -> int:
        return len(self.prompts)

    def hash(self) -> str:
        """SHA-256 of the prompts in their order."""
        return hashlib.sha256("\0".join(self.prompts).encode()).hexdigest()

    @property
    def drawable(self) -> int:
        """How many prompts a batch draws from."""
        return len(self.prompts) if self.part is None else len(self.part)

    def rows(self, index: Tensor) -> Tensor:
        """The prompts that indices below ``drawable`` stand for."""
        return index if self.part is None else self.part[index.to(self.part.device)].to(index.device)

    @property
    def nbytes(self) -> int:
        """What the encoded prompts take on the teacher's device."""
        return 0 if self._table is None else size_in_bytes(self._table)

    def conditions(self, index: Tensor) -> Any:
        """The conditions of the prompts ``index`` [B]."""
        if self._table is not None:
            return take(self._table, index.to(self.teacher.device))
        return self.teacher.encode([self.prompts[i] for i in index.tolist()])


def cycled(n: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices below ``n`` in shuffled rounds, so that each comes up equally often."""
    rounds = -(-count // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[:count]
