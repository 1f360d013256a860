"""``TimeMLP``: a denoising network for vectors, small enough to train in seconds. Certificates and examples start from it."""

import copy
import math

import torch
from torch import Tensor, nn

from fastdiff.models.condition import Condition, split_guidance
from fastdiff.models.guidance_embedding import embed_guidance

_TOLD = 64  # width of the embedding of a told guidance scale


class TimeMLP(nn.Module):
    """``mlp(x_t [B, d], t [B], labels [B]) -> [B, d]``: SiLU layers on x_t, sines of t and an embedded label.

    Args:
        dim: d.
        time_scale: the largest network time; the sines see ``t / time_scale``.
        classes: number of labels; -1 is the null label, and without classes labels are ignored.
        octaves: the sines have the angular frequencies ``pi 2^k``, k = -1 .. octaves - 2. What is fitted to a law pointwise has a
            derivative in time whose error grows with the largest of them.
    """

    def __init__(
        self, dim: int, *, hidden: int = 128, depth: int = 3, time_scale: float = 999.0, classes: int = 0, octaves: int = 8
    ) -> None:
        super().__init__()
        self.time_scale, self.classes, self.octaves = time_scale, classes, octaves
        widths = [dim + 2 * octaves + (16 if classes else 0), *[hidden] * depth]
        self.label = nn.Embedding(classes + 1, 16) if classes else None
        self.told: nn.Module | None
        self.register_module("told", None)
        layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(hidden, dim)

    def with_guidance_embedding(self) -> "TimeMLP":
        """A copy that is told its guidance scale (``condition.with_guidance``), the same, to the bit, until it is trained.

        As in LCM's UNet (``guidance_embedding``), a projection of the scale's sines, zero at first, is added to those of the time.

        Raises:
            ValueError: it is told already.
        """
        if self.told is not None:
            raise ValueError("this network is told its guidance scale already.")
        network = copy.deepcopy(self)
        like = self.out.weight
        told = nn.Linear(_TOLD, 2 * self.octaves, bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(told.weight)
        network.told = told
        return network

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        angles = (
            (t.to(x_t) / self.time_scale)[:, None] * math.pi * 2.0 ** torch.arange(-1, self.octaves - 1, device=x_t.device).to(x_t)
        )
        labels, scale = split_guidance(cond)
        sines = torch.cat([angles.sin(), angles.cos()], dim=1)
        if (scale is None) != (self.told is None):
            raise ValueError("only a network made by with_guidance_embedding takes a condition with a guidance scale, and it must.")
        if scale is not None and self.told is not None:
            sines = sines + self.told(embed_guidance(scale, _TOLD).to(sines))
        parts = [x_t, sines]
        if self.label is not None:
            if labels is None:
                raise ValueError("this network has classes: pass labels, -1 for none.")
            parts.append(self.label(labels + 1))
        out: Tensor = self.out(self.hidden(torch.cat(parts, dim=1)))
        return out
