"""The one convention of guidance."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import BETAS

from fastdiff.diffusion import Prediction, guide, process_from_scheduler, x0_from_output
from fastdiff.diffusion.guidance import scale_from_w


def two(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    c, u = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return c, u


def test_one_is_off_zero_is_unconditional_and_two_extrapolates() -> None:
    c, u = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(guide(c, u, 1), c)
    assert torch.equal(guide(c, u, 0), u)
    assert torch.equal(guide(c, u, 2), torch.tensor([5.0, -3.0]))


@pytest.mark.parametrize("w", [0.0, 0.75, 6.5])
def test_scale_of_the_other_convention(w: float) -> None:
    c, u = two()
    torch.testing.assert_close(guide(c, u, scale_from_w(w)), c + w * (c - u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_commutes_with_every_parametrisation(scale: float) -> None:
    """Guidance on x0 with the unguided eps kept would break the DDIM step: both come from one guided quantity."""
    process, _ = process_from_scheduler(DDIMScheduler(**BETAS).config)
    t = torch.tensor([0, 20, 500, 980, 999])
    x_t, _ = two(1)
    eps_c, eps_u = two(2)
    x0_c, x0_u = (x0_from_output(e, x_t, t, process, "epsilon") for e in (eps_c, eps_u))
    on_x0 = Prediction(x_t, t, guide(x0_c, x0_u, scale), process)
    on_eps = Prediction(x_t, t, x0_from_output(guide(eps_c, eps_u, scale), x_t, t, process, "epsilon"), process)
    for name in ("x0", "eps", "v", "score"):
        torch.testing.assert_close(getattr(on_x0, name), getattr(on_eps, name), rtol=1e-11, atol=1e-11)
    v = [Prediction(x_t, t, x0, process).v for x0 in (x0_c, x0_u)]
    torch.testing.assert_close(on_x0.v, guide(*v, scale), rtol=1e-11, atol=1e-11)


def test_scale_may_differ_between_samples() -> None:
    c, u = two()
    scales = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    guided = guide(c, u, scales[:, None, None])
    assert torch.equal(guided, torch.stack([guide(c[i], u[i], s) for i, s in enumerate(scales.tolist())]))
