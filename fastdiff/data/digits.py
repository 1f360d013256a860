"""scikit-learn's 1,797 handwritten digits, 8x8 pixels: class-conditional, in pixel space, for what must take seconds."""

import torch
from torch import Tensor

from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.process import NoiseProcess


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and labels [1797], int64. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).double() / 8 - 1
    return images[:, None], torch.from_numpy(digits.target).long()


def teacher(process: NoiseProcess, *, std: float = 0.1) -> GaussianMixture:
    """The exact denoiser of the digits blurred by ``std``: a Gaussian around every image, conditioned on its class."""
    images, labels = load()
    n = len(images)
    variances = torch.full((n,), std**2, dtype=images.dtype)
    return GaussianMixture(images.flatten(1), variances, torch.ones(n), process, labels=labels, shape=(1, 8, 8))
