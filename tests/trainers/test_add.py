"""ADD: its distillation term in closed form, what guides it, and that the teacher is no part of the gradient."""

from pathlib import Path

import pytest
import torch
from short_runs import shake, started

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.teacher import Teacher
from fastdiff.proof import laws
from fastdiff.trainers import ADD
from fastdiff.trainers.method import Calls, Method

_FEW = {"pairs": 8, "pair_steps": 2}
VARIANTS: dict[str, Method] = {"hinge": ADD(**_FEW)}


def test_the_distillation_term_is_the_weighted_distance_to_the_law_s_own_denoising(tmp_path: Path) -> None:
    law = Gaussian.anisotropic(laws.process(), d=4, spread=5.0)
    network = TimeMLP(4, hidden=32)
    teacher = Teacher.from_module(network, law.process, "v_prediction", shape=(4,), law=law, bottleneck=("hidden", 32))
    method = ADD(pairs=64, pair_steps=8, pair_guidance_scale=1.0, distillation_weight=1.7)
    with started(method, tmp_path, teacher, batch_size=32) as run:
        (batch,) = run._micro_batches(0)
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (term,) = method.further(x, batch.cond, batch, run._roles).values()
        t, eps = method.times("distillation_t", batch), batch.noise("distillation_eps")
        alpha = expand(law.process.alpha(t), x)
        error = x - law(law.process.add_noise(x.detach(), eps, t), t).x0
        assert term.item() == pytest.approx((1.7 * alpha * error.square()).mean().item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(term, x)
        assert torch.allclose(gradient, (2 * 1.7 * alpha * error / error.numel()).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("scale", "asked"), [(1.0, 4), (3.0, 5)])
def test_the_teacher_is_guided_as_it_was_for_the_stored_results(scale: float, asked: int, tmp_path: Path) -> None:
    method = ADD(**_FEW, pair_guidance_scale=scale)
    assert method.calls(("student", "discriminator"))["teacher"] == Calls(asked, 1)
    with started(method, tmp_path) as run:
        shake(run)
        run._iteration(0)
        assert run._roles.ledger["teacher"] == 4 * asked


def test_without_its_term_it_would_be_ladd_and_is_refused() -> None:
    with pytest.raises(UserError, match="ladd"):
        ADD(distillation_weight=0.0)
