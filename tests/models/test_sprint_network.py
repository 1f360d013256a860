"""The network of a SANA-Sprint student: dense time fitted to the old embedding, guidance heard but at first without effect."""

from typing import Any

import pytest
import torch
from tiny import tiny_sana
from torch import Tensor

from fastdiff.models.condition import repeat, with_guidance
from fastdiff.models.sprint_network import DENSE, sprint_network
from fastdiff.models.teacher import Teacher


def outputs(teacher: Teacher, network: Any, t: float, scale: float | None) -> Tensor:
    x = torch.randn(4, 4, *[teacher.latent_shape[-1]] * 2, generator=torch.Generator().manual_seed(0))
    cond = repeat(teacher.encode(["a red boot on a white background"]), 4)
    cond = cond if scale is None else with_guidance(cond, torch.full((4,), scale, dtype=torch.float64))
    with torch.no_grad():
        return teacher.family.network(network)(x, torch.full((4,), 1000 * t, dtype=torch.float64), cond)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_it_says_what_the_bundled_teacher_says_but_for_the_fast_part_of_its_time(t: float) -> None:
    """Reached: 0.4 to 1.3 % of the velocity's size."""
    teacher = Teacher.from_pretrained("fashion-flow")
    old, new = teacher.family.backbone, sprint_network(teacher.family.backbone)
    want, found = outputs(teacher, old, t, None), outputs(teacher, new, t, 4.5)
    assert (found - want).norm() < 0.025 * want.norm()


def test_the_embedded_time_is_slow() -> None:
    """Its slope in s, before and after: what a consistency model's tangent is made of. The fast part is a fifth of it."""
    old = Teacher.from_pretrained("fashion-flow").family.backbone
    new: Any = sprint_network(old)
    s = torch.linspace(0, 1, 4001)
    with torch.no_grad():
        before = old.time_embed.emb.timestep_embedder(old.time_embed.emb.time_proj(1000 * s))  # type: ignore[union-attr, operator]
        after = new.time_embed.timestep_embedder(new.time_embed.time_proj(s))
    slopes = [curve.diff(dim=0).square().sum(1).mean().sqrt() for curve in (before, after)]
    assert slopes[1] < 0.9 * slopes[0]


def test_a_scale_is_heard_once_the_last_layer_is_off_zero_and_only_that_layer_was_zero() -> None:
    teacher = Teacher(tiny_sana(), name="fashion-flow")
    new = sprint_network(teacher.family.backbone)
    assert torch.equal(outputs(teacher, new, 0.5, 1.0), outputs(teacher, new, 0.5, 5.0))
    guidance = new.time_embed.guidance_embedder
    assert guidance.linear_1.weight.std() > 0.01
    torch.nn.init.normal_(guidance.linear_2.weight, generator=torch.Generator().manual_seed(0))
    assert (outputs(teacher, new, 0.5, 1.0) - outputs(teacher, new, 0.5, 5.0)).abs().max() > 1e-3


def test_the_network_is_given_a_tenth_of_the_scale_and_a_time_of_at_most_one() -> None:
    teacher = Teacher(tiny_sana(), name="fashion-flow")
    new = sprint_network(teacher.family.backbone)
    seen: list[dict[str, Any]] = []
    new.time_embed.register_forward_pre_hook(lambda module, args, kwargs: seen.append({"t": args[0], **kwargs}), with_kwargs=True)
    outputs(teacher, new, 0.3, 4.5)
    assert torch.allclose(seen[0]["t"].double(), torch.full((4,), 0.3, dtype=torch.float64))
    assert torch.allclose(seen[0]["guidance"], torch.full((4,), 0.45))


def test_dense_time_is_kept_and_a_distilled_network_refused() -> None:
    network = tiny_sana().transformer
    network.register_to_config(timestep_scale=DENSE)
    new = sprint_network(network)
    for key, value in network.time_embed.emb.timestep_embedder.state_dict().items():
        assert torch.equal(value, new.time_embed.timestep_embedder.state_dict()[key])
    with pytest.raises(ValueError, match="embeds its guidance already"):
        sprint_network(new)
