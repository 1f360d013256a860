"""The small network of certificates and examples."""

import pytest
import torch

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


def test_a_network_with_classes_needs_labels() -> None:
    with pytest.raises(ValueError, match="labels"):
        TimeMLP(2, classes=2)(torch.zeros(1, 2), torch.zeros(1))
