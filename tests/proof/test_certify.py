"""Certificates: the laws, the measures, the rows; one seed of the two quickest certificates."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Roles
from fastdiff.proof.certify import FIXED_POINT, METRICS, Drawn, Row, certify, masses
from fastdiff.proof.laws import LAWS, draw_labels, exact, teacher
from fastdiff.trainers import DMD2, ODEPairs
from fastdiff.trainers.method import Batch


def drawn(name: str, n: int = 4000, seed: int = 0) -> tuple[Drawn, torch.Tensor]:
    """Exact samples of a law with the labels they were asked for, and as many more of the same labels."""
    law, generator = exact(name), torch.Generator().manual_seed(seed)
    labels = draw_labels(law, n, generator)
    noise = torch.randn(n, *law.shape, generator=generator)
    return Drawn(law.sample(n, generator, labels), labels, noise), law.sample(n, generator, labels)


@pytest.mark.parametrize("name", LAWS)
def test_exact_samples_are_near_the_law_in_every_metric_and_spoilt_ones_are_not(name: str) -> None:
    given, reference = drawn(name)
    law = exact(name)
    for metric in ("sliced_w2", "covariance", "w2"):
        measure, spoilt = METRICS[metric], Drawn(1.3 * given.samples + 0.3, given.labels, given.noise)
        assert measure(law, given, reference) < 0.3 * measure(law, spoilt, reference), metric
    assert METRICS["mode_mass"](law, given, reference) < 0.3


def test_a_lost_mode_is_an_error_of_one_and_labels_are_drawn_as_the_law_has_them() -> None:
    given, reference = drawn("classes")
    law = exact("classes")
    shares = torch.stack([(given.labels == label).double().mean() for label in range(3)])
    assert (shares - torch.tensor([0.20, 0.30, 0.50])).abs().max() < 0.03
    assert (masses(law, given) - law.weights).abs().max() < 0.03
    rare = law.mode_of(given.samples) == 7
    moved = torch.where(rare[:, None], law.means[6].expand(len(rare), -1), given.samples)
    assert METRICS["mode_mass"](law, Drawn(moved, given.labels, given.noise), reference) == pytest.approx(1.0)


def spoilt(name: str, defect: str) -> tuple[Drawn, torch.Tensor]:
    """Exact samples with one thing wrong that a picture would hardly show."""
    given, reference = drawn(name, n=8000)
    law, x = exact(name), given.samples.double()
    if defect == "modes are points":
        x = law.means[law.mode_of(x)]
    elif defect == "15 % junk":
        x = torch.where((torch.arange(len(x)) % 20 < 3)[:, None], given.noise.double(), x)
    elif defect == "half of a mode moved":
        move = (law.mode_of(x) == 0) & (torch.arange(len(x)) % 2 == 0)
        x = torch.where(move[:, None], x - law.means[0] + law.means[1], x)
    else:  # the four narrowest of sixteen directions are flat
        flat = law.basis[0][:, :4]
        x = x - (x - law.means[0]) @ flat @ flat.T
    return Drawn(x, given.labels, given.noise), reference


@pytest.mark.parametrize(
    ("name", "defect"),
    [("ring", "modes are points"), ("ring", "15 % junk"), ("ring", "half of a mode moved"), ("gaussian", "four flat directions")],
)
def test_a_spoilt_law_misses_a_shipped_bound(name: str, defect: str) -> None:
    """Distances alone pass all of these."""
    given, reference = spoilt(name, defect)
    law, bounds = exact(name), {k: v for k, v in ODEPairs.trials[name].bounds.items() if k != "flow_map"}
    fresh = Drawn(reference, given.labels, given.noise)
    assert all(METRICS[metric](law, fresh, drawn(name, n=8000, seed=1)[1]) <= bound for metric, bound in bounds.items())
    assert any(METRICS[metric](law, given, reference) > bound for metric, bound in bounds.items())


def test_sliced_w2_looks_within_each_class() -> None:
    """Samples of the right mixture under the wrong labels are not the conditional law."""
    given, reference = drawn("classes")
    law = exact("classes")
    assert METRICS["sliced_w2"](law, Drawn(given.samples, given.labels.flip(0), given.noise), reference.flip(0)) > 1.0


@pytest.mark.parametrize("name", ["gaussian", "ring", "classes"])
def test_the_flow_map_error_of_the_teachers_own_long_trajectory_is_small(name: str) -> None:
    """DDIM in all 1000 times is near the exact ends, and shuffled samples, of the very same law, are not."""
    law = exact(name)
    generator = torch.Generator().manual_seed(0)
    labels = draw_labels(law, 64, generator)
    noise = torch.randn(64, *law.shape, generator=generator, dtype=torch.float64)
    x = noise
    for t in range(999, 0, -1):
        prediction = law(x, torch.full((64,), t), labels)
        x = law.process.alpha(torch.tensor(t - 1)) * prediction.x0 + law.process.sigma(torch.tensor(t - 1)) * prediction.eps
    x = law(x, torch.zeros(64, dtype=torch.long), labels).x0
    good = METRICS["flow_map"](law, Drawn(x, labels, noise), x)
    assert good < 0.02
    assert METRICS["flow_map"](law, Drawn(x.roll(1, 0), labels, noise), x) > 0.3


def test_the_starting_network_is_near_the_law_and_the_same_for_the_same_seed() -> None:
    oracle = teacher("ring", seed=3)
    law, generator = exact("ring"), torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (500,), generator=generator)
    x0 = law.sample(500, generator).float()
    x_t = law.process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
    network = Denoiser(oracle.family.network(oracle.family.backbone), law.process, oracle.prediction_type)
    v, want = network(x_t, t, None).v, law(x_t, t).v
    assert (v - want).square().mean() < 0.02 * want.square().mean()
    again = teacher("ring", seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(oracle.family.backbone.parameters(), again.family.backbone.parameters(), strict=True)
    )
    assert oracle.family.backbone is not again.family.backbone


def test_a_value_above_its_bound_or_nan_does_not_pass() -> None:
    def row(value: float) -> Row:
        return Row("m", "l", "x", value, 0.5, 1.0, 0.1, 1.0, 0)

    assert row(0.5).passed
    assert not row(0.51).passed
    assert not row(math.nan).passed
    assert row(0.51).as_json()["pass"] is False


@pytest.mark.parametrize("law", ["ring", "gaussian"])
def test_the_quickest_certificates(law: str) -> None:
    """ODE pairs: 1,500 iterations, ten seconds each on a quiet core."""
    threads = torch.get_num_threads()
    rows = certify(ODEPairs, law)
    assert torch.get_num_threads() == threads
    assert {row.metric for row in rows} == set(ODEPairs.trials[law].bounds)
    for row in rows:
        assert row.passed, row
        assert row.value < 0.5 * row.baseline, row
        assert row.floor < row.bound


class Silent(DMD2):
    """Gives its samples no gradient anywhere, so none at the optimum either."""

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return {name: term.detach() for name, term in super().loss(update, batch, roles).items()}


class Guided(DMD2):
    """Forgets that a guided score is no law's."""

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        self.guidance_scale = 2.0
        return super().loss(update, batch, roles)


@pytest.mark.parametrize("method", [Silent, Guided], ids=lambda m: m.__name__)
def test_a_fixed_point_is_missed_by_a_method_without_gradient_and_by_one_that_pulls_elsewhere(method: type[DMD2]) -> None:
    assert certify(DMD2, FIXED_POINT)[0].passed
    assert not certify(method, FIXED_POINT)[0].passed
