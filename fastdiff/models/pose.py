"""``CameraEmbedding``: where a picture is seen from, as a vector that is added to a denoiser's time embedding.

A family says where that is (``Family.time_embedding``). The embedding is zero at first: a score network with an untrained one
computes what it did without.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class CameraEmbedding(nn.Module):
    """A pose [B, 4, 4] to a vector [B, width], by 16 -> width -> width with SiLU; ProlificDreamer, arXiv 2305.16213."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, pose: Tensor) -> Tensor:
        out: Tensor = self.last(torch.nn.functional.silu(self.first(pose.flatten(1).to(self.first.weight.dtype))))
        return out


@contextmanager
def added_to(layer: nn.Module, vector: Tensor) -> Iterator[None]:
    """Inside, ``vector`` [B, D] is added to every output [B, D] of ``layer``."""
    handle = layer.register_forward_hook(lambda module, inputs, output: output + vector.to(output))
    try:
        yield
    finally:
        handle.remove()
