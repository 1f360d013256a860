"""What needs no training: the gradient a method gives the samples of a known generator, with every score exact.

A Gaussian of each class is the teacher's law, and the generator is affine, ``x = b_y + A z``, so the law of its samples is known as
well and answers for the fake score. The method's own loss then gives each sample a gradient that is free of any training error:

- zero at the optimum ``N(b_y, A A^T) = p(x | y)``, for every method that follows the difference of two scores;
- equal to the paper's formula everywhere else, guidance and normalisers included.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data.prompts import PromptTable
from fastdiff.diffusion.exact import GaussianMixture
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.law import LawDenoiser
from fastdiff.models.teacher import Teacher
from fastdiff.proof.laws import process
from fastdiff.trainers.draws import Draws
from fastdiff.trainers.method import Batch, Method


class _Generator(Denoiser):
    """``x0 = b_y + A z + offset``, whatever the time; ``offset`` [B, d] is zero and gathers each sample's gradient."""

    def __init__(self, biases: Tensor, factor: Tensor, offset: Tensor, schedule: NoiseProcess) -> None:
        self.biases, self.factor, self.offset = biases, factor, offset
        super().__init__(lambda x_t, t, cond: x_t, schedule, "sample")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        x0 = self.biases[cond] + x_t.double() @ self.factor.mT + self.offset
        return Prediction(x_t, t, x0, self.process)


@dataclass
class ExactRoles:
    """In the place of ``Roles``: the teacher's law, the generator, and the law of the generator's samples for all else."""

    teacher: Teacher
    student: Denoiser
    fake: GaussianMixture
    modules: dict[str, nn.Module] = field(default_factory=dict)
    ledger: Counter[str] = field(default_factory=Counter)

    def denoiser(self, name: str) -> Denoiser:
        """The exact denoiser of a role."""
        if name == "student":
            return self.student
        return LawDenoiser(self.teacher.law if name == "teacher" else self.fake)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Setting:
    """Two Gaussian classes in ``d`` dimensions, and a generator that is right where ``shift`` is 0 and ``spread`` is 1.

    ``shift`` moves the generator's means, ``spread`` multiplies its deviations.
    """

    shift: float = 0.0
    spread: float = 1.0
    n: int = 64
    d: int = 4
    seed: int = 0

    def laws(self) -> tuple[GaussianMixture, GaussianMixture, Tensor, Tensor]:
        """The teacher's law, the generator's, and the generator's b [2, d] and A [d, d]."""
        generator = torch.Generator().manual_seed(self.seed)
        factor = torch.randn(self.d, self.d, generator=generator, dtype=torch.float64) / self.d**0.5
        means = torch.randn(2, self.d, generator=generator, dtype=torch.float64)
        labels, weights = torch.arange(2), torch.ones(2)
        turn = torch.linalg.qr(torch.randn(self.d, self.d, generator=generator, dtype=torch.float64))[0]
        biases, scaled = means + self.shift, self.spread * factor @ turn  # another A with the same A A^T
        real = GaussianMixture(
            means, None, weights, process(), covariances=(factor @ factor.mT).expand(2, -1, -1).clone(), labels=labels
        )
        fake = GaussianMixture(
            biases, None, weights, process(), covariances=(scaled @ scaled.mT).expand(2, -1, -1).clone(), labels=labels
        )
        return real, fake, biases, scaled

    def batch(self, law: GaussianMixture) -> Batch:
        """The batch a method's loss gets: a teacher that is ``law``, prompts "0" and "1", float64 draws."""
        teacher = Teacher.from_module(nn.Linear(1, 1), law.process, "sample", shape=law.shape, prompts=["0", "1"], law=law)
        return Batch(_Double(self.seed, 0, 0, size=self.n, part=slice(0, self.n)), PromptTable(["0", "1"], teacher), teacher)


class _Double(Draws):
    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).double()


def sample_gradients(method: Method, setting: Setting, *, update: str = "student") -> tuple[Tensor, Batch, ExactRoles]:
    """n times the gradient of the method's loss with respect to each generated sample [n, d], float64.

    Also the batch, whose ``draws`` repeat the method's own noise and times by name, and the roles it was made with.
    """
    real, fake, biases, factor = setting.laws()
    batch = setting.batch(real)
    offset = torch.zeros(setting.n, setting.d, dtype=torch.float64, requires_grad=True)
    roles = ExactRoles(batch.teacher, _Generator(biases, factor, offset, real.process), fake)
    loss = sum(method.loss(update, batch, roles).values())  # type: ignore[arg-type]
    assert isinstance(loss, Tensor)
    if not loss.requires_grad:
        return torch.zeros_like(offset), batch, roles
    (gradient,) = torch.autograd.grad(loss, [offset], allow_unused=True)
    return (torch.zeros_like(offset) if gradient is None else setting.n * gradient), batch, roles
