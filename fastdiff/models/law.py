"""A law in closed form (``fastdiff.diffusion.exact``) in the place of a network: guided, counted and trained against like one."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import DiscreteVP, NoiseProcess
from fastdiff.models.denoiser import Denoiser


class Law(Protocol):
    """Whatever predicts x0 from ``(x_t, t, cond)`` without a network."""

    process: NoiseProcess

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Prediction: ...

    def under(self, process: NoiseProcess) -> "Law":
        """The same law seen through another noise process."""


class LawDenoiser(Denoiser):
    """A law as a ``Denoiser``; ``count`` is told the number of samples of every call, ``watch`` is shown its x0."""

    def __init__(
        self, law: Law, *, count: Callable[[int], object] = lambda n: None, watch: Callable[[Tensor], object] = lambda x0: None
    ) -> None:
        self.law, self.count, self.watch = law, count, watch
        super().__init__(self._as_network, law.process, "sample")

    def continuous(self) -> "LawDenoiser":
        if not isinstance(self.process, DiscreteVP):
            return self
        return LawDenoiser(self.law.under(self.process.continuous()), count=self.count, watch=self.watch)

    def _as_network(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        raise TypeError("a law is asked at times of its process, not at a network's; call the denoiser itself.")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        self.count(len(x_t))
        prediction = self.law(x_t, t, cond)
        self.watch(prediction.x0)
        return prediction
