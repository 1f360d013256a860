"""Discriminator heads on a denoiser's features: of its bottleneck (DMD2, arXiv 2405.14867, section 4.3), or of several blocks.

The paper's head for SD 1.5 is conv4x4 s2, GN32, SiLU, conv4x4 s4, GN32, SiLU, 1x1 on 8x8 features of width 1280. Here the second
convolution covers whatever the first leaves, so that 4x4 features of small teachers fit; groups hold 16 channels, since a group of
two values at one position is normalised to a sign, through which no gradient is worth anything.

``PositionHead`` is SANA-Sprint's (arXiv 2503.09641), for one block of several: a logit at every position.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, leaky_relu


class _Tapped(Exception):
    """Stops a network whose remaining layers are not needed."""


def maps_at(modules: Sequence[nn.Module], call: Callable[[], Any]) -> list[Tensor]:
    """What each of ``modules``, in the order in which they run, puts out during ``call()``; the layers after the last do not run.

    Raises:
        RuntimeError: the call never reached one of them.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        if module is modules[-1]:
            raise _Tapped

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        with suppress(_Tapped):
            call()
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(modules):
        names = ", ".join(type(module).__name__ for module in modules)
        raise RuntimeError(f"{names} was not called: there are no features to discriminate.")
    return found


def features_at(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What ``module`` puts out during ``call()``; the layers after it do not run.

    Raises:
        RuntimeError: the call never reached the module.
    """
    return maps_at([module], call)[0]


class VectorHead(nn.Module):
    """Features [B, width] to one logit per sample [B]."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.to(next(self.parameters()).dtype))[:, 0]
        return logits


class TokenHead(nn.Module):
    """Features [B, h w, width] of tokens, row by row, to one logit per sample [B]; ``size`` is h = w or (h, w), at least 2."""

    def __init__(self, width: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size, self.head = size if isinstance(size, tuple) else (size, size), FeatureHead(width, size)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.unflatten(1, self.size).movedim(-1, 1))
        return logits


class FeatureHead(nn.Module):
    """Features [B, width, h, w], ``size`` being h = w or (h, w), at least 2, to one logit per sample [B]."""

    def __init__(self, width: int, size: int | tuple[int, int], hidden: int = 64) -> None:
        super().__init__()
        height, across = size if isinstance(size, tuple) else (size, size)
        groups = max(hidden // 16, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 4, stride=2, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, (height // 2, across // 2)),
            nn.GroupNorm(groups, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.to(next(self.parameters()).dtype)).mean(dim=(1, 2, 3))
        return logits


class PositionHead(nn.Module):
    """Features [B, N, width] or [B, width, h, w], at least 4 positions, to a logit at each of them, [B, N].

    ``h = lrelu(norm(W / |W| f))``, ``h <- (h + lrelu(norm(conv_9 h))) / sqrt 2``, ``logit = w h + b``: SANA-Sprint's, with a slope
    of 0.2, a 1x1 convolution W over its spectral norm, and one of 9 that wraps around the row of positions. Departures: the norms
    have the statistics of one sample in 8 groups of channels, where the paper's have those of 8 samples, so that a logit does not
    depend on how a batch is cut; |W| is exact, not a power iteration, so the head has no state; ``hidden`` channels, not width.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.project = nn.Conv1d(width, hidden, 1)
        self.mix = nn.Conv1d(hidden, hidden, 9, padding=4, padding_mode="circular")
        self.norms = nn.ModuleList([nn.GroupNorm(8, hidden) for _ in range(2)])
        self.logit = nn.Conv1d(hidden, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        weight = self.project.weight
        rows = features.to(weight.dtype)
        rows = rows.transpose(1, 2) if rows.ndim == 3 else rows.flatten(2)
        size = torch.linalg.matrix_norm(weight[:, :, 0], ord=2)
        h = leaky_relu(self.norms[0](conv1d(rows, weight / size, self.project.bias)), 0.2)
        h = (h + leaky_relu(self.norms[1](self.mix(h)), 0.2)) / 2**0.5
        logits: Tensor = self.logit(h)[:, 0]
        return logits
