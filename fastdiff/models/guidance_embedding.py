"""A network that is told its guidance scale, as LCM's students are (arXiv 2310.04378).

    emb(w) = [sin 1000 w f_i, cos 1000 w f_i],   f_i = 10^(-4 i / (n/2 - 1)),   w = s - 1
    time input <- sinusoid(t) + P emb(w)                 P a matrix, zero at the start

With P = 0 the network puts out what it put out before, bit for bit. The pipelines of diffusers make the same embedding of their
``guidance_scale`` for a UNet with ``time_cond_proj_dim`` set, and never run its unconditional pass.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 256
"""Of LCM's embedding."""


def embed_guidance(scale: Tensor, width: int = WIDTH) -> Tensor:
    """``emb`` of scales s [B], [B, width] in float32, in diffusers' order of rounding: 1000 w is large, and its sine shows it."""
    angles = _angles(scale, width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _angles(scale: Tensor, width: int) -> Tensor:
    half = width // 2
    w = (scale.double() - 1).float() * 1000.0
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-torch.tensor(10000.0).log().item() / (half - 1)))
    return w[:, None] * frequencies[None, :]


def with_guidance_embedding(unet: Any, width: int = WIDTH) -> Any:
    """The UNet with a guidance embedding whose projection is zero, in eval mode; other weights are copies.

    Raises:
        ValueError: the network has one already, or takes none.
    """
    student = type(unet).from_config(unet.config, time_cond_proj_dim=width)
    missing, surplus = student.load_state_dict(unet.state_dict(), strict=False)
    if surplus or missing != ["time_embedding.cond_proj.weight"]:
        raise ValueError(f"the guidance embedding does not fit this network: missing {missing}, surplus {surplus}.")
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.eval() if student.dtype == unet.dtype else student.to(dtype=unet.dtype).eval()


def rebased(unet: Any, scale: float, other: float) -> Any:
    """A copy of a UNet that, told ``other + x``, does what the UNet does when told ``scale + x``; exactly so at x = 0.

    Every pair (sin, cos) of the embedding turns by the angle between the two, and the projection turns back:

        P' = P R,   R emb(other) = emb(scale)

    A pipeline's default scale so becomes any other one, and a bare call is right.
    """
    network = copy.deepcopy(unet)
    weight = network.time_embedding.cond_proj.weight
    width = weight.shape[1]
    old, new = (_angles(torch.tensor([value], dtype=torch.float64), width).double() for value in (scale, other))
    turn = (old - new).to(weight.device)
    sines, cosines = weight.detach().double().chunk(2, dim=1)
    turned = torch.cat([sines * turn.cos() - cosines * turn.sin(), sines * turn.sin() + cosines * turn.cos()], dim=1)
    weight.data = turned.to(weight.dtype)
    return network


def guidance_width(unet: Any) -> int | None:
    """Width of the guidance embedding that a UNet takes, None where it takes none."""
    width: int | None = unet.config.get("time_cond_proj_dim")
    return width
