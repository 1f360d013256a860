"""A smaller network of a teacher's own kind: fewer channels, fewer layers, its first weights selected from the teacher's.

A tensor of the small network takes every r-th entry of the teacher's of the same name along each dimension,

    w_small[i, j, ...] = w[ floor(i b_1 / s_1), floor(j b_2 / s_2), ... ]          b, s: sizes in the teacher and in the student

so that channels selected in one layer are those that the next one reads, also across the concatenated skips of a UNet where all
widths shrink by one factor. A layer that the teacher lacks, or that is larger than its own, keeps the random initialisation.
The multi-student paper (arXiv 2410.23274) starts its smaller students from scratch or by selection; uniform selection is as in
Xu et al., Initializing Models with Larger Ones (ICLR 2024, arXiv 2311.18823), recalled.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP


def smaller(network: nn.Module, *, width: float = 0.5, layers: int | None = None) -> nn.Module:
    """A network like ``network`` with ``width`` times its channels and ``layers`` layers (a block, of a UNet; None: as many).

    Widths are rounded up to what the network's norm groups divide and to whole attention heads. Parameters fall about as
    ``width**2``.

    Raises:
        UserError: another kind of network than UNet2DConditionModel, SanaTransformer2DModel or TimeMLP, or a width outside (0, 1].
    """
    if not 0 < width <= 1 or (layers is not None and layers < 1):
        raise UserError(f"width {width} and layers {layers}: a smaller network has a width in (0, 1] and at least one layer.")
    if isinstance(network, TimeMLP):
        small: nn.Module = _mlp(network, width, layers)
    elif type(network).__name__ in {"UNet2DConditionModel", "UNet2DModel"}:
        small = _unet(network, width, layers)
    elif type(network).__name__ == "SanaTransformer2DModel":
        small = _sana(network, width, layers)
    else:
        raise UserError(
            f"no rule for a smaller {type(network).__name__}: build a network that takes the same inputs, and hand it over with "
            "Start(network=...)."
        )
    return select_weights(small, network).train(network.training).requires_grad_(True)


def _mlp(network: TimeMLP, width: float, layers: int | None) -> TimeMLP:
    dim, hidden = network.out.out_features, math.ceil(network.out.in_features * width)
    depth = layers or len(network.hidden) // 2
    return TimeMLP(dim, hidden=hidden, depth=depth, time_scale=network.time_scale, classes=network.classes)


def _unet(network: Any, width: float, layers: int | None) -> nn.Module:
    config, divisor = network.config, _divisor(network.config)
    channels = [divisor * math.ceil(c * width / divisor) for c in config.block_out_channels]
    changes: dict[str, Any] = {"block_out_channels": channels}
    if layers is not None:
        changes["layers_per_block"] = layers
    return _like(network, changes)


def _sana(network: Any, width: float, layers: int | None) -> nn.Module:
    config = network.config
    heads, across = (math.ceil(config[name] * width) for name in ("num_attention_heads", "num_cross_attention_heads"))
    inner = heads * config.attention_head_dim
    changes = {"num_attention_heads": heads, "num_cross_attention_heads": across, "cross_attention_dim": inner}
    return _like(network, {**changes, "num_layers": layers or config.num_layers})


def _like(network: Any, changes: dict[str, Any]) -> nn.Module:
    with torch.device(network.device):
        small: nn.Module = type(network).from_config(network.config, **changes)
    return small if small.dtype == network.dtype else small.to(network.dtype)


def _divisor(config: Any) -> int:
    """What every width of a UNet is a multiple of: its norm groups, and its heads where their number is fixed.

    ``attention_head_dim`` of UNet2DConditionModel is the number of heads, by an old mistake of names; in UNet2DModel it is a size.
    """
    heads = config.get("num_attention_heads") or (config["attention_head_dim"] if "cross_attention_dim" in config else 1)
    numbers = heads if isinstance(heads, list | tuple) else [heads or 1]
    return math.lcm(config["norm_num_groups"] or 1, *numbers)


@torch.no_grad()
def select_weights(small: nn.Module, large: nn.Module) -> nn.Module:
    """Put the selected weights of ``large`` into ``small``, where names and ranks agree and no size grows; returns ``small``."""
    source = large.state_dict()
    for name, value in small.state_dict().items():
        given = source.get(name)
        if given is not None and given.ndim == value.ndim and all(b >= s for b, s in zip(given.shape, value.shape, strict=True)):
            value.copy_(_every(given, value.shape))
    return small


def _every(tensor: Tensor, shape: torch.Size) -> Tensor:
    for dim, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) * tensor.shape[dim] // size
        tensor = tensor.index_select(dim, index)
    return tensor
