"""Conditions of a batch: a tensor [B, ...] or a dict of such tensors, joined and indexed along the batch.

A network that is told its guidance scale takes ``{"cond": condition, "guidance_scale": [B]}``, the scale in this library's
convention (1 is off).
"""

from typing import Any

import torch
from torch import Tensor

Condition = Tensor | dict[str, Any]


def concat(*parts: Any) -> Any:
    """The conditions one after another along the batch."""
    if isinstance(parts[0], dict):
        return {key: concat(*(part[key] for part in parts)) for key in parts[0]}
    return torch.cat(parts)


def take(condition: Any, index: Tensor | slice) -> Any:
    """The rows ``index`` of a condition."""
    if isinstance(condition, dict):
        return {key: take(value, index) for key, value in condition.items()}
    return condition[index]


def size_in_bytes(condition: Any) -> int:
    """What a condition takes in memory."""
    if isinstance(condition, dict):
        return sum(map(size_in_bytes, condition.values()))
    return condition.numel() * condition.itemsize


def repeat(condition: Any, n: int) -> Any:
    """A condition of batch 1 for a batch of ``n``, without copying memory."""
    if isinstance(condition, dict):
        return {key: repeat(value, n) for key, value in condition.items()}
    return condition.expand(n, *condition.shape[1:])


def same(one: Any, other: Any) -> Tensor:
    """Which samples [B] have equal conditions in both."""
    if isinstance(one, dict):
        return torch.stack([same(one[key], other[key]) for key in one]).all(0)
    return (one == other).reshape(len(one), -1).all(1)


def with_guidance(condition: Any, scale: Tensor) -> Condition:
    """A condition that says the guidance scale [B] too."""
    return {"cond": condition, "guidance_scale": scale}


def split_guidance(condition: Any) -> tuple[Any, Tensor | None]:
    """The condition itself, and the guidance scale [B] that it says, if any."""
    if isinstance(condition, dict) and "guidance_scale" in condition:
        return condition["cond"], condition["guidance_scale"]
    return condition, None
