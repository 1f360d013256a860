"""Inception score: are single images of a certain class, and are the classes of all images many?

    IS = exp( mean over x of KL( p(c | x) || p(c) ) ),   p(c) = mean over x of p(c | x),   by splits, averaged

(Salimans et al., "Improved techniques for training GANs", NeurIPS 2016, arXiv:1606.03498.) It sees no reference. Its value
grows with the size of a split, and codes differ: torch-fidelity shuffles (seed 2020) and cuts into 10 near-equal splits,
the evaluator of guided-diffusion cuts splits of 5000 in the order given; both are arguments here. torchmetrics shuffles
without a seed, cuts as ``torch.chunk`` does and prints the unbiased sd. The spread over splits is no error of the mean.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """Mean over splits and the published population sd over them."""

    value: float
    sd: float
    splits: int


def inception_score(logits: Tensor, *, splits: int = 10, split_size: int | None = None, seed: int | None = 2020) -> InceptionScore:
    """Inception score of class logits [n, C]: 1 when all images look alike to the classifier, C at most.

    Args:
        splits: near-equal parts, [i n / splits, (i + 1) n / splits).
        split_size: parts of this size in their stead, the last one maybe smaller; 5000 as guided-diffusion has it.
        seed: of the shuffle by numpy's ``RandomState``; None keeps the order.

    ``ValueError`` for fewer images than splits.
    """
    n = len(logits)
    if logits.ndim != 2 or n < max(1, splits if split_size is None else 1) or (split_size is not None and split_size < 1):
        raise ValueError(f"logits {tuple(logits.shape)} for {splits} splits: expected [n, C] with an image or more a split.")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(n))]
    if split_size is None:
        cuts = [i * n // splits for i in range(1, splits)]
        parts = logits.tensor_split(cuts)
    else:
        parts = logits.split(split_size)
    scores = torch.stack([_one(part) for part in parts])
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item(), len(scores))


def _one(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - torch.tensor(len(log_p), dtype=log_p.dtype, device=log_p.device).log()
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()
