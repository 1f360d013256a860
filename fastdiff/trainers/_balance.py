"""VQGAN's adaptive weight of a second loss term: as large as makes its pull on the network's last layer that of the first.

    lambda = |grad_last L_first| / |grad_last L_second|, clipped to [0.01, 10]

The weight of an iteration is that of the whole batch of the one before, over micro-batches and ranks, and a checkpoint has it: one
that is measured on its own batch weighs each micro-batch differently, and accumulation would change the gradient. It starts at 1.
The last layer is the last matrix among the network's parameters, the output layer of every family here.
Esser et al., Taming Transformers (CVPR 2021, arXiv 2012.09841; recalled); the clip is CTM's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.roles import Roles
from fastdiff.trainers._ranks import over_ranks

LOW, HIGH = 0.01, 10.0


class Balance(nn.Module):
    """What is remembered: lambda."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(()))

    @torch.no_grad()
    def settle(self, pulls: Tensor) -> None:
        """Take lambda from the summed gradients of the last layer, [2, n]; one that is not finite changes nothing."""
        first, second = over_ranks(pulls).norm(dim=1)
        ratio = (first / second).clamp(LOW, HIGH)
        if torch.isfinite(ratio):
            self.weight.copy_(ratio)


def add_pulls(shared: dict[str, Any], first: Tensor, second: Tensor, roles: Roles, name: str) -> None:
    """Add a micro-batch's gradients of two terms at the last layer of role ``name`` to ``shared["pulls"]``, [2, n]; graphs stay."""
    last = [p for p in roles.parameters(name) if p.ndim > 1][-1]
    pulls = torch.stack([torch.autograd.grad(term, last, retain_graph=True)[0].flatten() for term in (first, second)])
    shared["pulls"] = shared.get("pulls", 0) + pulls
