"""What the score-distillation methods share: the denoising loss of a fake score under any process, and full precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import EDM, ContinuousVP, DiscreteVP, expand
from fastdiff.losses import denoising
from fastdiff.losses.weights import edm_weight


def score_matching(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching in the parametrisation that the process's teachers are trained in, elementwise [B, ...].

    Variance preserving: the error of eps (DMD2, SwiftBrush). EDM: that of x0 with EDM's weight (DMD2 on ImageNet). Rectified flow
    and TrigFlow: that of the velocity ``a' x0 + s' eps``.
    """
    process, t = prediction.process, prediction.t
    if isinstance(process, DiscreteVP | ContinuousVP):
        return denoising(prediction.eps, eps)
    if isinstance(process, EDM):
        weight = edm_weight(process.alpha(t), process.sigma(t), sigma_data=process.sigma_data)
        return denoising(prediction.x0, x0, weight=weight)
    velocity = expand(process.dalpha(t), x0) * x0 + expand(process.dsigma(t), x0) * eps
    return denoising(prediction.velocity, velocity)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off where ``like`` is, for small differences of network outputs; the meta device knows no autocast."""
    return nullcontext() if like.device.type == "meta" else torch.autocast(like.device.type, enabled=False)
