"""What the processes of a run tell each other, besides the gradients that the engine averages."""

import torch
from torch import Tensor


def over_ranks(total: Tensor) -> Tensor:
    """The sum of ``total`` over all processes; itself in a run of one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.clone()
        torch.distributed.all_reduce(total)
    return total
