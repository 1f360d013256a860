"""Discriminator heads on a denoiser's bottleneck features (DMD2, arXiv 2405.14867, section 4.3).

The paper's head for SD 1.5 is conv4x4 s2, GN32, SiLU, conv4x4 s4, GN32, SiLU, 1x1 on 8x8 features of width 1280. Here the second
convolution covers whatever the first leaves, so that 4x4 features of small teachers fit; groups hold 16 channels, since a group of
two values at one position is normalised to a sign, through which no gradient is worth anything.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Tapped(Exception):
    """Carries features out of a network whose remaining layers are not needed."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def features_at(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What ``module`` puts out during ``call()``; the layers after it do not run.

    Raises:
        RuntimeError: the call never reached the module.
    """

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _Tapped(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(stop)
    try:
        call()
    except _Tapped as tapped:
        return tapped.features
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} was not called: there are no features to discriminate.")


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
