"""Random numbers of one step: by name, from ``(seed, rank, step)``, and independent of how the batch is cut.

A draw is made for the whole batch of a step on this rank and a micro-batch takes its slice, so 4 x 1 and 1 x 4 accumulation see
the same numbers; nothing is carried from step to step, so a resumed run repeats itself to the bit.
"""

import hashlib

import torch
from torch import Tensor


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded from the parts of ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Draws:
    """Draws of a step for the samples ``part`` of a batch of ``size``.

    ``normal``, ``uniform`` and ``integers`` differ between samples and ranks; ``choice`` is one number that every rank and
    every micro-batch agrees on, for decisions that change the graph.
    """

    def __init__(self, seed: int, rank: int, step: int, *, size: int, part: slice, device: torch.device | str = "cpu") -> None:
        self.key, self.size, self.part, self.device = (seed, rank, step), size, part, device

    def __len__(self) -> int:
        return len(range(*self.part.indices(self.size)))

    @property
    def ranks(self) -> "list[Draws]":
        """The ranks whose draws these are: one."""
        return [self]

    def at(self, step: int, size: int) -> "Draws":
        """The draws of this rank at another step, all of a batch of ``size``."""
        return Draws(*self.key[:2], step, size=size, part=slice(size), device=self.device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape]."""
        return torch.randn(self.size, *shape, generator=generator_for(*self.key, name))[self.part].to(self.device)

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), [B], float64."""
        return torch.rand(self.size, generator=generator_for(*self.key, name), dtype=torch.float64)[self.part].to(self.device)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Integers low..high-1, [B]."""
        return torch.randint(low, high, (self.size,), generator=generator_for(*self.key, name))[self.part].to(self.device)

    def choice(self, name: str) -> float:
        """One uniform number in [0, 1) for the whole step, equal on all ranks."""
        seed, _, step = self.key
        return torch.rand((), generator=generator_for(seed, step, name), dtype=torch.float64).item()
