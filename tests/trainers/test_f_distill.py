"""f-distill: DMD2 with weights, which are of the global batch and of a ratio that is remembered."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from short_runs import gradients, join_ranks, shake, started, tensors_of
from torch import Tensor

from fastdiff import Trainer
from fastdiff.errors import UserError
from fastdiff.losses import F_DIVERGENCES
from fastdiff.trainers import DMD2, FDistill
from fastdiff.trainers.f_distill import BINS, Divergence, RatioHead
from fastdiff.trainers.method import Method

PAIRS = {"pairs": 12, "pair_steps": 2}
VARIANTS: dict[str, Method] = {
    "js": FDistill(ratio=(1, 3), **PAIRS),
    "kl-lora-warm": FDistill(divergence="forward_kl", ratio=(2, 3), fake_score="lora", rank=4, warm_start_steps=2, **PAIRS),
}
H = {
    "reverse_kl": lambda r: 1.0,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "squared_hellinger": lambda r: r**0.5,
    "jeffreys": lambda r: 1 + r,
}


def loosen(run: Trainer, logits: list[float]) -> None:
    """The discriminator's logits at the first batch: as they come to be with these numbers in the place of its head."""

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(()))

        def forward(self, features: Tensor) -> Tensor:
            return torch.tensor(logits)[: len(features)] + self.bias

    run._roles.modules["discriminator"].head = Head()


def test_reverse_kl_is_dmd2_to_the_bit(tmp_path: Path) -> None:
    found = []
    for method in (FDistill(divergence="reverse_kl", ratio=(1, 2), **PAIRS), DMD2(gan_weight=1e-3, ratio=(1, 2), **PAIRS)):
        with started(method, tmp_path / method.name()) as run:
            shake(run)
            found.append(gradients(run))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 5  # of an iteration with the student: one and two roles; of one without: two
    for key, gradient in found[0].items():
        assert torch.equal(gradient.nan_to_num(), found[1][key].nan_to_num())


def test_equal_ratios_give_equal_weights_and_so_dmd2s_gradient(tmp_path: Path) -> None:
    found = []
    for method in (FDistill(divergence="neyman", gan_weight=1e-9, **PAIRS), DMD2(**PAIRS)):
        with started(method, tmp_path / method.name()) as run:
            shake(run)
            if isinstance(method, FDistill):
                loosen(run, [1.5] * 4)
            batch = run._micro_batches(0)
            for update in method.updates(0)[:-1]:
                run._backward(update, batch, method.trains(update))
            found.append(torch.cat([p.grad.flatten() for p in run._roles.parameters("student") if p.grad is not None]))
    assert found[1].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_a_samples_gradient_is_weighted_by_h_of_its_clipped_ratio_over_the_mean(kind: Divergence, tmp_path: Path) -> None:
    logits = [-5.0, 0.0, 1.0, 9.0]
    with started(FDistill(divergence=kind, ratio=(1, 1), **PAIRS), tmp_path) as run:
        loosen(run, logits)
        head = run._roles.modules["discriminator"]
        head.typical.copy_(torch.linspace(0.5, 2.0, BINS))
        batch = run._micro_batches(0)[0]
        bins = (batch.times("student_t", 20, 980) - 20) * BINS // 961
        ratios = torch.tensor(logits).clamp(math.log(0.1), math.log(20.0)).exp() / head.typical[bins]
        if run.method.weighs():
            run._backward("ratio", [batch], ())
        plain = torch.ones(4, *run.teacher.latent_shape)
        got = run.method.weighted(plain, batch, run._roles)[:, 0, 0, 0]
    want = torch.tensor([H[kind](r) for r in ratios.tolist()])
    torch.testing.assert_close(got, want / want.mean(), rtol=1e-5, atol=0)
    assert got.mean().item() == pytest.approx(1, rel=1e-5)


def test_at_a_ratio_of_one_js_and_softened_reverse_kl_are_a_half(tmp_path: Path) -> None:
    for kind in ("jensen_shannon", "softened_reverse_kl"):
        with started(FDistill(divergence=kind, **PAIRS), tmp_path / kind) as run:
            loosen(run, [0.0] * 4)
            batch = run._micro_batches(0)[0]
            run._backward("ratio", [batch], ())
            assert torch.equal(batch.memo["weight"], torch.full((4,), 0.5))


def test_the_mean_is_of_all_micro_batches(tmp_path: Path) -> None:
    """By micro-batches of one sample, each weight over its own mean would be 1: DMD2, without a word."""
    weights = []
    for size, count in ((4, 1), (1, 4)):
        with started(FDistill(**PAIRS), tmp_path / str(size), batch_size=size, accumulation=count) as run:
            shake(run)
            micro = run._micro_batches(0)
            run._backward("ratio", micro, ())
            ones = torch.ones(size, *run.teacher.latent_shape)
            weights.append(torch.cat([run.method.weighted(ones, batch, run._roles)[:, 0, 0, 0] for batch in micro]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=0)
    assert weights[0].std() > 1e-4


def test_running_means_move_by_what_each_bin_got_and_skip_what_is_not_finite() -> None:
    head = RatioHead(torch.nn.Linear(1, 1))
    sums, counts = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    sums[0], counts[0] = 6.0, 2.0
    sums[3], counts[3] = math.nan, 1.0
    head.remember(sums, counts, 0.9)
    want = torch.ones(BINS)
    want[0] = 0.9 + 0.1 * 3.0
    torch.testing.assert_close(head.typical, want)


def test_a_checkpoint_has_the_running_means(tmp_path: Path) -> None:
    """The gauntlet compares them after a resumed run; here that they had moved by then."""
    with started(FDistill(ratio=(1, 1), **PAIRS), tmp_path) as run:
        shake(run)
        for _ in range(3):
            run.advance()
        run._save()
        live = run._roles.modules["discriminator"].typical.clone()
    stored = tensors_of(tmp_path)["role.discriminator"]["typical"]
    assert torch.equal(stored, live)
    assert (stored != 1).sum() >= 3
    with started(FDistill(ratio=(1, 1), **PAIRS), tmp_path, resume=True) as run:
        assert torch.equal(run._roles.modules["discriminator"].typical, stored)


def test_the_weights_are_the_same_on_two_ranks_as_on_one_batch(tmp_path: Path) -> None:
    """The gauntlet compares gradients; here the sums of a joined batch against those of its halves."""
    with started(FDistill(**PAIRS), tmp_path) as run:
        shake(run)
        join_ranks(run, 2)
        (joined,) = run._micro_batches(0)
        run._backward("ratio", [joined], ())
        assert joined.shared["ratios"].shape == (1 + 2 * BINS,)
        assert joined.shared["ratios"][1 + BINS :].sum() == 4
        assert joined.shared["ratios"][0].item() == pytest.approx(joined.memo["weight"].sum().item())


def test_weights_give_the_discriminator_no_gradient(tmp_path: Path) -> None:
    with started(FDistill(**PAIRS), tmp_path) as run:
        batch = run._micro_batches(0)[0]
        run._backward("ratio", [batch], ())
        assert not batch.memo["weight"].requires_grad
        run._backward("student", [batch], ("student",))
        assert all(p.grad is None for p in run._roles.parameters("discriminator"))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="gan_weight is 0"):
        FDistill(gan_weight=0.0)
    with pytest.raises(UserError, match="divergence"):
        FDistill(divergence="wasserstein")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="ratio_decay"):
        FDistill(ratio_decay=1.0)
    assert set(get_args(Divergence)) == F_DIVERGENCES.keys()
