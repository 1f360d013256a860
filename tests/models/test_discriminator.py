"""Discriminator heads and the tap on bottleneck features."""

import pytest
import torch
from tiny import tiny_teacher
from torch import nn

from fastdiff.models.discriminator import FeatureHead, features_at
from fastdiff.models.teacher import Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return tiny_teacher()


def inputs(teacher: Teacher) -> tuple[torch.Tensor, ...]:
    x = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([20, 500, 999]), teacher.encode(["a red boot on a white background", "", "a bag"])


def head(width: int, size: int, seed: int = 0) -> FeatureHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureHead(width, size)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_one_logit_a_sample_from_the_whole_map(size: int) -> None:
    """Every position counts, and no sample sees another: a logit of a batch is the logit alone."""
    network, features = head(5, size), torch.randn(3, 5, size, size, generator=torch.Generator().manual_seed(1))
    logits = network(features)
    assert logits.shape == (3,)
    torch.testing.assert_close(logits[1:2], network(features[1:2]), rtol=1e-5, atol=1e-6)
    for row, column in ((0, 0), (0, size - 1), (size - 1, 0), (size // 2, size // 2)):
        touched = features.clone()
        touched[:, :, row, column] += torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0])
        covered = 2 * (size // 2) + 1 >= size  # an odd map is seen through its padding
        assert not covered or ((network(touched) - logits).abs() > 1e-6).all()


@pytest.mark.parametrize(("width", "size"), [(32, 4), (88, 4), (320, 8)])
def test_a_logit_is_a_smooth_function_of_the_features(width: int, size: int) -> None:
    """A group of two values at one position is normalised to +1 and -1: a step function, whose gradient teaches nothing.

    The paper's head (1,280 channels in 32 groups) follows its own linearisation at 0.997 here.
    """
    generator = torch.Generator().manual_seed(1)
    network, features = head(width, size), torch.randn(64, width, size, size, generator=generator, requires_grad=True)
    logits = network(features)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    step = 0.1 * torch.randn(features.shape, generator=generator)
    change = (network(features + step) - logits).detach()
    linear = (gradient * step).flatten(1).sum(1)
    assert torch.corrcoef(torch.stack([change, linear]))[0, 1] > 0.95
    norms = gradient.flatten(1).norm(dim=1)
    assert norms.max() < 4 * norms.median()


def test_features_of_another_dtype_are_judged_in_the_dtype_of_the_head() -> None:
    """The fake score may be bfloat16 or, in a proof, float64."""
    network, features = head(5, 4), torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(network(features.bfloat16()), network(features.bfloat16().float()))
    assert network.double()(features.double()).dtype == torch.float64


def test_tapped_features_are_those_of_a_full_forward(teacher: Teacher) -> None:
    x, t, cond = inputs(teacher)
    unet, full = teacher.family.backbone, []
    module = teacher.family.bottleneck(unet)
    handle = module.register_forward_hook(lambda _module, _inputs, output: full.append(output))
    teacher.denoiser(x, t, cond)
    handle.remove()
    features = features_at(module, lambda: teacher.denoiser(x, t, cond))
    assert torch.equal(features, full[0])
    assert features.shape == (3, 32, 4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = teacher.family.head()(features)
    assert logits.shape == (3,)
    assert logits.std() > 0


def test_tapping_skips_the_decoder_and_leaves_no_hook(teacher: Teacher) -> None:
    x, t, cond = inputs(teacher)
    unet, ran = teacher.family.backbone, []
    module = teacher.family.bottleneck(unet)
    before = teacher.denoiser(x, t, cond).x0
    handles = [part.register_forward_hook(lambda part, *_: ran.append(part)) for part in (*unet.down_blocks, *unet.up_blocks)]
    features_at(module, lambda: teacher.denoiser(x, t, cond))
    for handle in handles:
        handle.remove()
    assert ran == list(unet.down_blocks)
    assert not module._forward_hooks
    assert torch.equal(teacher.denoiser(x, t, cond).x0, before)


def test_features_carry_gradient_to_the_input_and_to_the_encoder(teacher: Teacher) -> None:
    x, t, cond = inputs(teacher)
    x.requires_grad_()
    unet = teacher.family.backbone.requires_grad_(True)
    module = teacher.family.bottleneck(unet)
    try:
        features_at(module, lambda: teacher.denoiser(x, t, cond)).square().sum().backward()
        assert x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
        assert unet.conv_in.weight.grad.abs().max() > 0
        assert unet.conv_out.weight.grad is None
    finally:
        unet.requires_grad_(False)
        unet.zero_grad()


def test_a_module_that_is_never_reached_is_an_error(teacher: Teacher) -> None:
    x, t, cond = inputs(teacher)
    with pytest.raises(RuntimeError, match="Identity was not called"):
        features_at(nn.Identity(), lambda: teacher.denoiser(x, t, cond))


def test_another_error_in_the_forward_is_not_swallowed(teacher: Teacher) -> None:
    module = teacher.family.bottleneck(teacher.family.backbone)
    with pytest.raises(ZeroDivisionError):
        features_at(module, lambda: 1 / 0)
    assert not module._forward_hooks
