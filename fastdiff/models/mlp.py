"""``TimeMLP``: a denoising network for vectors, small enough to train in seconds. Certificates and examples start from it."""

import math

import torch
from torch import Tensor, nn


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
        layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        angles = (
            (t.to(x_t) / self.time_scale)[:, None] * math.pi * 2.0 ** torch.arange(-1, self.octaves - 1, device=x_t.device).to(x_t)
        )
        parts = [x_t, angles.sin(), angles.cos()]
        if self.label is not None:
            if labels is None:
                raise ValueError("this network has classes: pass labels, -1 for none.")
            parts.append(self.label(labels + 1))
        out: Tensor = self.out(self.hidden(torch.cat(parts, dim=1)))
        return out
