"""A SANA network as diffusers' ``SanaSprintPipeline`` calls it: told its guidance scale, its time s in [0, 1] and not 1000 s.

    time embedding   y(s) = B silu(A [cos f s, sin f s] + a) + b,    f = 1 .. 1e-4        the stock layers, refitted
    guidance         y(s) + G_2 silu(G_1 [cos f g, sin f g] + a) ,   g = 0.1 scale        G_2 = 0 at the start, G_1 not

With 1000 s in place of s the derivative of the embedding in time is 1000 times the embedding's own, and a consistency model's
tangent is lost in it; SANA-Sprint (arXiv 2503.09641) therefore fine-tunes its teacher to the dense embedding for 5,000
iterations. The stock network cannot multiply by 1000 inside, so the two cannot be equal; but the embedded time is a curve, and
its layers can draw it: A puts a knot of sin s at each hidden unit, B and b are the least squares on the old embedding. What is
left (on the bundled teacher 2 % of the modulation) is the fast part that the derivative is better without, and training starts
from there.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

DENSE = 1e-3
"""``timestep_scale`` of a network whose time is in [0, 1], where a scheduler counts to 1000."""
_STEEPEST, _GRID, _RIDGE = 64.0, 4001, 1e-6


def sprint_network(transformer: Any) -> Any:
    """A ``SanaTransformer2DModel`` with dense time and a guidance embedding, in eval mode; all other weights are copies.

    Raises:
        ValueError: the network embeds its guidance already.
    """
    if transformer.config.guidance_embeds:
        raise ValueError("the network embeds its guidance already: it is a distilled one. Take it from before its distillation.")
    options = {"guidance_embeds": True, "timestep_scale": DENSE}
    student = type(transformer).from_config({**transformer.config, **options, "_use_default_values": []})
    own = {key.replace("time_embed.emb.", "time_embed."): value for key, value in transformer.state_dict().items()}
    missing, surplus = student.load_state_dict(own, strict=False)
    if surplus or not all(key.startswith("time_embed.guidance_embedder.") for key in missing):
        raise ValueError(f"the guidance embedding does not fit this network: missing {missing}, surplus {surplus}.")
    last = student.time_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)  # of the layers before it, zeros would have no gradient, and the scale would never be heard
    nn.init.zeros_(last.bias)
    if transformer.config.timestep_scale != DENSE:
        _draw_curve(student.time_embed, transformer.time_embed.emb, transformer.config.timestep_scale)
    student = student.to(transformer.device)
    return student.eval() if student.dtype == transformer.dtype else student.to(transformer.dtype).eval()


@torch.no_grad()
def _draw_curve(new: Any, old: Any, timestep_scale: float) -> None:
    """Fit the layers of the embedded time to what the old ones make of ``1000 timestep_scale s``, s in [0, 1]."""
    first, last = new.timestep_embedder.linear_1, new.timestep_embedder.linear_2
    s = torch.linspace(0, 1, _GRID, dtype=torch.float64, device=first.weight.device)
    weights = next(old.timestep_embedder.parameters())
    wanted = old.timestep_embedder(old.time_proj((1000 * timestep_scale * s).to(weights.device)).to(weights.dtype))
    units = len(first.weight)
    slope = min(units / math.pi, _STEEPEST) * torch.ones_like(first.bias)
    slope[1::2] *= -1
    knots = torch.linspace(0, 1, units).to(slope).sin()
    first.weight.zero_()
    first.weight[:, first.weight.shape[1] // 2] = slope  # cosines come first: this is sin s
    first.bias.copy_(-slope * knots)
    hidden = silu(first(new.time_proj(s).to(first.weight))).double()
    basis = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    gram = basis.T @ basis / _GRID + _RIDGE * torch.eye(units + 1).to(basis)
    solution = torch.linalg.solve(gram, basis.T @ wanted.to(basis) / _GRID)
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
