"""A denoiser of one process seen under another: equal noise-to-signal ratio is equal information.

Two processes over the same x0 and eps meet where ``r = sigma / alpha`` is equal. There, with ``rho = sqrt(alpha^2 + sigma^2)``,

    x_inner = k x_outer,    k = rho_inner / rho_outer,    and x0 and eps are the same.

No training and no approximation, so guidance, which is affine in x0, commutes with it. Nothing is detached: the change of time and
scale takes part in derivatives, as sCM's tangent needs. From flow to TrigFlow it is SANA-Sprint's (ICCV 2025, arXiv 2503.09641);
the general wrapper is flow_matching's ScheduleTransformedModel (arXiv 2412.06264).

Both processes are over one x0. SANA multiplies its latents by sigma_data: that is TrigFlow(sigma_data=1) on the flow's own latents.
TrigFlow(sigma_data=0.5) on those is as exact, at other times: a sampler written for the first would put half the noise it means.
"""

from typing import Any, Protocol

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, expand


class Denoise(Protocol):
    """Whatever predicts x0 under a process: ``models.Denoiser``, ``exact.GaussianMixture``, ``SNRMatched``."""

    @property
    def process(self) -> NoiseProcess: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction: ...


def match_state(x_t: Tensor, t: Tensor, source: NoiseProcess, target: NoiseProcess) -> tuple[Tensor, Tensor]:
    """The state and time (x', t') of ``target`` that say of x0 what (x_t [B, ...], t [B]) of ``source`` say.

    Exact where the target has a time of that ratio. A DiscreteVP answers with its nearest row, and every VP table with its ends
    beyond them: x' then has the scale of t' and still the ratio of t. ``snap_time`` gives the times without that error.
    """
    matched = target.t_from_nsr(source.nsr(t)).to(x_t.device)
    k = target.norm(matched).to(x_t.device) / source.norm(t).to(x_t.device)
    return expand(k, x_t) * x_t, matched


def snap_time(t: Tensor, source: NoiseProcess, target: NoiseProcess) -> Tensor:
    """The time of ``source`` nearest to ``t`` whose ratio ``target`` has exactly: x_t made there is matched without error."""
    return source.t_from_nsr(target.nsr(target.t_from_nsr(source.nsr(t)))).to(t.device)


class SNRMatched:
    """``denoiser`` under ``process``: ``matched(x_t, t, cond) -> Prediction`` with the x0 that it gives at the matched state.

    A network that takes real times is not held to the rows of its table if its own process is the ``continuous()`` view of it.

    >>> import torch
    >>> from fastdiff.diffusion.exact import GaussianMixture
    >>> from fastdiff.diffusion.process import RectifiedFlow, TrigFlow
    >>> teacher = SNRMatched(GaussianMixture.ring(RectifiedFlow()), TrigFlow())
    >>> teacher(torch.tensor([[0.7, 0.1]]), torch.tensor([1.2])).trigflow.shape
    torch.Size([1, 2])
    """

    def __init__(self, denoiser: Denoise, process: NoiseProcess) -> None:
        self.denoiser, self.process = denoiser, process

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        x0 = self.denoiser(*match_state(x_t, t, self.process, self.denoiser.process), cond).x0
        return Prediction(x_t, t, x0, self.process)
