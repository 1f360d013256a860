"""The loss core: pure functions on tensors, unreduced, float32 or better inside, and the one reducer."""

from fastdiff.losses.adversarial import softplus_discriminator, softplus_generator
from fastdiff.losses.reduce import reduce
from fastdiff.losses.regression import pseudo_huber, squared_error
from fastdiff.losses.score import (
    denoising,
    distribution_matching_gradient,
    pseudo_target,
    score_distillation_gradient,
    variational_score_gradient,
)

__all__ = [
    "denoising",
    "distribution_matching_gradient",
    "pseudo_huber",
    "pseudo_target",
    "reduce",
    "score_distillation_gradient",
    "softplus_discriminator",
    "softplus_generator",
    "squared_error",
    "variational_score_gradient",
]
