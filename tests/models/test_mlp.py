"""The small network of certificates and examples."""

import pytest
import torch

from fastdiff.models.condition import with_guidance
from fastdiff.models.mlp import TimeMLP


def test_time_label_and_state_all_matter() -> None:
    torch.manual_seed(0)
    network = TimeMLP(2, classes=3)
    x, t, y = torch.randn(4, 2), torch.tensor([0, 10, 500, 999]), torch.tensor([-1, 0, 1, 2])
    out = network(x, t, y)
    assert (network(x + 0.1, t, y) - out).abs().amin(1).min() > 0
    assert (network(x, t.flip(0), y) - out).abs().amax(1).min() > 0
    assert (network(x, t, y.roll(1)) - out).abs().amax(1).min() > 0
    assert torch.equal(network(x[1:2], t[1:2], y[1:2]), out[1:2]) or torch.allclose(network(x[1:2], t[1:2], y[1:2]), out[1:2])


def test_neighbouring_times_are_told_apart_and_scale_with_the_largest() -> None:
    torch.manual_seed(0)
    network, x = TimeMLP(2), torch.zeros(2, 2)
    near = network(x, torch.tensor([998, 999]))
    assert (near[0] - near[1]).abs().max() > 1e-4
    torch.manual_seed(0)
    flow = TimeMLP(2, time_scale=1.0)
    assert torch.allclose(flow(x, torch.tensor([998.0, 999.0]) / 999), near, atol=1e-5)


@pytest.mark.parametrize("octaves", [2, 4])
def test_the_last_of_the_sines_has_the_frequency_of_its_octave(octaves: int) -> None:
    network, t = TimeMLP(2, octaves=octaves, time_scale=1.0), torch.tensor([0.03, 0.3])
    first = network.hidden[0]
    assert isinstance(first, torch.nn.Linear)
    weight = torch.zeros_like(first.weight)
    weight[0, 2 + octaves - 1] = 1.0  # after the two of x
    first.load_state_dict({"weight": weight, "bias": torch.zeros_like(first.bias)})
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
    network(torch.randn(2, 2), t)
    torch.testing.assert_close(seen[0], (torch.pi * 2.0 ** (octaves - 2) * t).sin())


def test_a_network_with_classes_needs_labels() -> None:
    with pytest.raises(ValueError, match="labels"):
        TimeMLP(2, classes=2)(torch.zeros(1, 2), torch.zeros(1))


def test_a_told_network_changes_no_bit_at_any_scale_and_learns_from_the_first_step() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = TimeMLP(2, classes=3)
    network = plain.with_guidance_embedding()
    generator = torch.Generator().manual_seed(0)
    x, t, labels = torch.randn(4, 2, generator=generator), torch.arange(4) * 300, torch.tensor([0, -1, 2, 1])
    scale = torch.tensor([1.0, 1.001, 1.004, 7.5], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(x, t, with_guidance(labels, scale)), plain(x, t, labels))
    network(x, t, with_guidance(labels, scale)).square().mean().backward()
    assert network.told.weight.grad.norm() > 0
    network.told.weight.data -= network.told.weight.grad / network.told.weight.grad.norm()
    with torch.no_grad():
        answers = network(x[:1].expand(4, -1), t[:1].expand(4), with_guidance(labels[:1].expand(4), scale))
    assert torch.cdist(answers, answers)[~torch.eye(4, dtype=bool)].min() > 1e-4
    assert list(dict(network.named_parameters()))[-2] == "out.weight"


def test_a_scale_and_a_network_that_takes_it_belong_together() -> None:
    plain, x, t = TimeMLP(2), torch.zeros(1, 2), torch.zeros(1)
    for network, cond in ((plain, with_guidance(None, torch.ones(1))), (plain.with_guidance_embedding(), None)):
        with pytest.raises(ValueError, match="with_guidance_embedding"):
            network(x, t, cond)
    with pytest.raises(ValueError, match="already"):
        plain.with_guidance_embedding().with_guidance_embedding()
