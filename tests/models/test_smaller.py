"""Smaller networks of a teacher's kind: which weights they take."""

import pytest
import torch
from tiny import tiny_sana, tiny_unet
from torch import nn

from fastdiff.errors import UserError
from fastdiff.models.mlp import TimeMLP
from fastdiff.models.smaller import select_weights, smaller


def test_every_second_channel_is_taken_on_both_sides() -> None:
    large = tiny_unet()
    small = smaller(large, width=0.5)
    assert small.config.block_out_channels == [8, 16]
    assert torch.equal(small.conv_in.weight, large.conv_in.weight[::2])
    inner = large.down_blocks[0].resnets[0].conv1.weight
    assert torch.equal(small.down_blocks[0].resnets[0].conv1.weight, inner[::2, ::2])
    joined = large.up_blocks[1].resnets[0].conv1.weight  # reads 32 channels and a skip of 16
    assert torch.equal(small.up_blocks[1].resnets[0].conv1.weight, joined[::2, ::2])


def test_width_one_is_the_network_itself() -> None:
    large = tiny_unet()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 16, 32))
    with torch.no_grad():
        assert torch.equal(smaller(large, width=1.0)(*inputs).sample, large(*inputs).sample)


def test_a_transformer_keeps_every_second_head_and_its_first_layers() -> None:
    large = tiny_sana().transformer
    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 9, 32), torch.tensor([3.0, 900.0]))
    with torch.no_grad():
        assert torch.equal(smaller(large, width=1.0)(*inputs).sample, large(*inputs).sample)
    small = smaller(large, width=0.5, layers=3)
    assert (small.config.num_attention_heads, len(small.transformer_blocks)) == (1, 3)
    assert torch.equal(small.transformer_blocks[2].attn2.to_k.weight, large.transformer_blocks[2].attn2.to_k.weight[::2, ::2])
    shift = slice(0, 32, 2)  # the first of six parts of the modulation, each of the width of the network
    assert torch.equal(small.time_embed.linear.weight[:16], large.time_embed.linear.weight[shift, ::2])
    assert torch.isfinite(small(*inputs).sample).all()


def test_widths_are_rounded_up_to_norm_groups_and_heads() -> None:
    assert smaller(tiny_unet(), width=0.3).config.block_out_channels == [8, 16]  # 4.8 and 9.6, groups of 8


def test_a_small_mlp_repeats_the_large_one_whose_other_units_are_copies() -> None:
    """Units in equal pairs with half the outgoing weight: one unit of each pair with the whole is the same function."""
    large = TimeMLP(2, hidden=8, depth=2, classes=3)
    small = smaller(large, width=0.5)
    with torch.no_grad():
        first, second = large.hidden[0], large.hidden[2]
        for layer in (first, second):
            layer.weight[1::2], layer.bias[1::2] = layer.weight[::2].clone(), layer.bias[::2].clone()
        select_weights(small, large)
        small.hidden[2].weight.copy_(second.weight[::2, ::2] + second.weight[::2, 1::2])
        small.out.weight.copy_(large.out.weight[:, ::2] + large.out.weight[:, 1::2])
        inputs = (torch.randn(5, 2), torch.tensor([0, 10, 500, 998, 999]), torch.tensor([-1, 0, 1, 2, 0]))
        assert torch.allclose(small(*inputs), large(*inputs), atol=1e-6)


def test_fewer_layers_keep_the_first_ones() -> None:
    large = TimeMLP(2, hidden=8, depth=3)
    small = smaller(large, width=1.0, layers=2)
    assert len(small.hidden) == 4
    assert torch.equal(small.hidden[2].weight, large.hidden[2].weight)


def test_a_network_without_a_rule_is_refused() -> None:
    with pytest.raises(UserError, match="Linear"):
        smaller(nn.Linear(2, 2))
