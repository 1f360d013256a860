"""MIND: the sliced Wasserstein distance of features, which needs no matrix root and few images.

    MIND = 3 d  mean over unit directions u and ranks j of  (sort(X u)_j - sort(Y u)_j)^2

(Berthet et al., "MIND: Monge inception distance for generative models evaluation", arXiv:2605.06797, as quoted and coded in
torch-fidelity 0.5: 1000 directions.) It sees whole marginals, not moments only. The value of two sets of one law falls
as 1 / n: compare values of equal n only.
"""

import torch
from torch import Tensor


def mind(x: Tensor, reference: Tensor, *, directions: int = 1000, seed: int = 2020) -> float:
    """MIND of features ``x`` [n, d] and ``reference`` [m, d], in squared feature units.

    Args:
        directions: random unit vectors.
        seed: of the directions and, when n and m differ, of the subset of the larger set that pairs with the smaller one;
            drawn as torch-fidelity draws them, so that equal seeds give its value.
    """
    if x.ndim != 2 or reference.ndim != 2 or x.shape[1] != reference.shape[1] or not len(x) or not len(reference):
        raise ValueError(f"features have shapes {tuple(x.shape)} and {tuple(reference.shape)}: expected [n, d] and [m, d].")
    generator, d = torch.Generator().manual_seed(seed), x.shape[1]
    n = min(len(x), len(reference))
    x, reference = (f if len(f) == n else f[torch.randperm(len(f), generator=generator)[:n]] for f in (x, reference))
    draws = torch.randn(directions, d, generator=generator)
    units = (draws / draws.norm(dim=1, keepdim=True).clamp(min=1e-12)).to(x.device)
    total = 0.0
    for part in units.split(64):  # columns at a time: n x 1000 sorted values need not be held
        a, b = ((f.detach() @ part.to(f).T).double().sort(dim=0).values for f in (x, reference))
        total += (a - b).square().mean(dim=0).sum().item()
    return 3 * d * total / directions
