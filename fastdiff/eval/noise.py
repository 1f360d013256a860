"""The randomness of image i: a generator that depends on (seed, i) and on nothing else.

Its seed is the first seven bytes of SHA-256("fastdiff.eval <seed> <i>"), so that no training run meets this noise by counting
up. Batch size, number of processes, order and interruptions do not enter: image i starts from the same latents, to the bit,
and a stochastic scheduler that is handed the list draws the same noise for it.

>>> generators(0, range(4, 8))                             # of images 4, 5, 6 and 7
"""

import hashlib
from collections.abc import Iterable

import torch


def image_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of image ``index``."""
    digest = hashlib.sha256(f"fastdiff.eval {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One fresh generator for each image of ``indices``."""
    return [image_generator(seed, int(index)) for index in indices]
