"""What autograd keeps until the backward pass, counted on tensors without values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fastdiff.diffusion.process import NoiseProcess
from fastdiff.models.roles import Roles


def kept_for_backward(loss: Callable[[], Any], *, ignore: set[int]) -> int:
    """Bytes that autograd keeps while ``loss()`` is alive, every storage once, without those of ``ignore``."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in ignore:
            kept[_storage(tensor)] = tensor  # held, so that no other storage takes its place
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def resident(roles: Roles) -> set[int]:
    """The storages that stay whether or not a loss is running."""
    networks = [*roles.modules.values(), *roles.teacher.family.networks()]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return {_storage(tensor) for tensor in tensors}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Timeless(NoiseProcess):
    """A process asked at times without values: its coefficients have none either."""

    def __init__(self, process: NoiseProcess) -> None:
        self.process, self.t_min, self.t_max, self.sigma_data = process, process.t_min, process.t_max, process.sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.empty_like(t, dtype=torch.float64)

    sigma = dalpha = dsigma = alpha

    @property
    def initial_scale(self) -> float:
        return self.process.initial_scale

    def t_from_nsr(self, r: Tensor) -> Tensor:
        return torch.empty_like(r)

    def at_level(self, level: Tensor) -> Tensor:
        return self.process.at_level(level)

    def network_time(self, t: Tensor) -> Tensor:
        return self.process.network_time(t)


class _FusedAttention(TorchFunctionMode):
    """Attention on the meta device that keeps what fused kernels keep: inputs, output and a logarithm a row."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **options)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        options |= dict(zip(names, args, strict=False))
        query, key, value, mask = (options.get(name) for name in names[:4])
        if not isinstance(query, Tensor) or query.device.type != "meta" or options.get("enable_gqa"):
            return func(*args, **(kwargs or {}))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, attn_mask=mask if isinstance(mask, Tensor) and mask.is_floating_point() else None)[0]
