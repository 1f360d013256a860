"""Networks that are told their guidance scale: diffusers' own embedding, and nothing changed before it is trained."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from tiny import tiny_teacher
from torch import nn

from fastdiff.diffusion.guidance import w_from_scale
from fastdiff.diffusion.process import RectifiedFlow
from fastdiff.models.condition import with_guidance
from fastdiff.models.families.module import Module
from fastdiff.models.guidance_embedding import embed_guidance, with_guidance_embedding

SCALES = [1.0, 6.0, 8.3, 11.0, 16.0]


@pytest.mark.parametrize("width", [4, 256])
@pytest.mark.parametrize("kind", [LatentConsistencyModelPipeline, StableDiffusionPipeline])
def test_the_embedding_is_that_which_pipelines_make_of_their_guidance_scale(kind: type, width: int) -> None:
    """To the bit: their w is s - 1 in double, and the sine of 1000 w magnifies the last digit of a float32 one."""
    w = torch.tensor([w_from_scale(scale) for scale in SCALES])
    want = kind.get_guidance_scale_embedding(None, w, width)
    assert torch.equal(embed_guidance(torch.tensor(SCALES, dtype=torch.float64), width), want)
    assert want.std() > 0.3


def inputs(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 8, 8, generator=generator), torch.arange(n) * 249, torch.randn(n, 16, 32, generator=generator)


def test_a_new_embedding_changes_no_bit_at_any_scale_and_learns_from_the_first_step() -> None:
    teacher = tiny_teacher()
    network = teacher.family.guidance_embedding()(teacher.family.backbone)
    assert network.config.time_cond_proj_dim == 256
    assert not network.training
    x, t, text = inputs()
    cond = with_guidance(text, torch.tensor(SCALES, dtype=torch.float64))
    with torch.no_grad():
        plain = teacher.family.network(teacher.family.backbone)(x, t, text)
        assert torch.equal(teacher.family.network(network)(x, t, cond), plain)
    teacher.family.network(network)(x, t, cond).square().mean().backward()
    projection = network.time_embedding.cond_proj.weight
    assert projection.grad.norm() > 0
    projection.data -= projection.grad / projection.grad.norm()
    with torch.no_grad():
        answers = teacher.family.network(network)(
            x[:1].expand(5, -1, -1, -1), t[:1].expand(5), with_guidance(text[:1].expand(5, -1, -1), cond["guidance_scale"])
        )
    assert (answers[1:] - answers[0]).flatten(1).norm(dim=1).min() > 1e-3  # one input, five scales


def test_a_copy_shares_no_weight_with_the_teacher() -> None:
    teacher = tiny_teacher()
    before = teacher.weights_hash()
    network = with_guidance_embedding(teacher.family.backbone)
    for parameter in network.parameters():
        parameter.data += 1
    assert teacher.weights_hash() == before


def test_a_scale_for_a_network_without_an_embedding_is_refused() -> None:
    teacher = tiny_teacher()
    x, t, text = inputs()
    with pytest.raises(ValueError, match="no embedding for it"):
        teacher.denoiser(x, t, with_guidance(text, torch.tensor(SCALES)))
    with pytest.raises(ValueError, match="does not fit"):
        with_guidance_embedding(with_guidance_embedding(teacher.family.backbone))


def test_a_family_without_such_a_network_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Module has no network that is told its guidance scale"):
        Module(nn.Linear(1, 1), RectifiedFlow(), "flow_prediction", (1,)).guidance_embedding()
