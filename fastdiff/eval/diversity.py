"""Diversity within a prompt: does the same prompt with other noise give another image?

    mean over prompts of   2 / (n (n - 1)) sum_{i<j} d(x_i, x_j),     x_1 ... x_n the images of the prompt

A student that collapsed keeps its FD and its CLIP score for some time, but not this. With LPIPS features it is the
"diversity" of DMD2 (arXiv:2405.14867, recalled); of other features name them beside the number.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastdiff.eval.groups import members
from fastdiff.eval.stats import Score


def prompt_diversity(
    features: Tensor, prompts: Sequence[Hashable], *, distance: Literal["euclidean", "cosine"] = "euclidean"
) -> Score:
    """Mean pairwise distance within a prompt, with the standard error over prompts.

    Args:
        features: [N, d], one row an image.
        prompts: the prompt of each row, two images or more each; every prompt counts the same.
        distance: ``"euclidean"``, or ``"cosine"`` for 1 - cosine.

    ``ValueError`` naming a prompt that has one image: it has no pair, and counting it as 0 would lower the mean.
    """
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"distance is {distance!r}: expected 'euclidean' or 'cosine'.")
    if len(features) != len(prompts):
        raise ValueError(f"{len(features)} feature rows and {len(prompts)} prompts: expected one prompt a row.")
    rows = members(prompts)
    lone = [prompt for prompt, found in rows.items() if len(found) < 2]
    if lone:
        raise ValueError(f"{len(lone)} prompts such as {lone[0]!r} have one image: draw two or more, with different noise.")
    x = features.detach().double()
    if distance == "euclidean":
        return Score.of(torch.stack([torch.pdist(x[index]).mean() for index in rows.values()]))
    x = normalize(x, dim=1)
    return Score.of(torch.stack([torch.pdist(x[index]).square().mean() / 2 for index in rows.values()]))  # |x - y|^2 / 2
