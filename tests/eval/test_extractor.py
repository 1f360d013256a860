import pytest
import torch
from torch import nn

from fastdiff.errors import UserError
from fastdiff.eval.classifier import FashionClassifier
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.extractors import EXTRACTORS, load_extractor
from fastdiff.eval.fashion import REFERENCE, features
from fastdiff.eval.frechet import frechet
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.stats import Stats
from fastdiff.eval.weightless import cosine, pixel_pca, random_conv


def images(n: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)

    def forward(self, levels):
        return self.drop(self.norm(self.conv(levels / 255))).mean(dim=(2, 3))


def small(**options) -> FeatureExtractor:
    torch.manual_seed(0)
    defaults = {"name": "small", "network": Small(), "preprocess": Preprocess("none"), "dim": 5, "digest": "01234567"}
    return FeatureExtractor(**{**defaults, **options})


def test_a_parents_train_changes_neither_features_nor_buffers():
    extractor = small()
    expected = extractor(images(8))
    extractor.network.train()
    assert torch.equal(extractor(images(8)), expected)
    assert extractor.network.norm.num_batches_tracked == 0


def test_autocast_and_tf32_do_not_reach_the_network():
    extractor, seen = small(), []
    extractor.network.conv.register_forward_hook(
        lambda _m, _i, out: seen.append((out.dtype, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    expected = extractor(images(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images(4)), expected)
    assert seen == [(torch.float32, False, False)] * 2
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_a_network_in_half_precision_is_used_in_float32():
    assert small(network=Small().half())(images(2)).dtype == torch.float32


@pytest.mark.parametrize("make", [small, pixel_pca, random_conv, lambda: load_extractor("fashion")])
def test_batch_size_one_equals_64(make):
    extractor, x = make(), images(70)
    one, many, odd = (extractor.features(x, batch_size=size) for size in (1, 64, 9))
    for other in (one, odd):
        assert ((other - many).abs().max() / many.abs().max()).item() < 1e-5


def test_the_id_changes_with_everything_that_features_depend_on():
    ids = {
        small(**options).id
        for options in (
            {},
            {"name": "other"},
            {"digest": "76543210"},
            {"layer": "logits"},
            {"preprocess": Preprocess("none", "truncate")},
            {"preprocess": Preprocess("clean")},
            {"published": True},
        )
    }
    assert len(ids) == 7
    assert small().id == "small#01234567;none"
    assert small().label == "FD[small#01234567;none]"


def test_statistics_of_another_preprocess_are_refused_by_the_distance():
    x = images(40)
    a, b = (Stats.of(e.features(x), extractor=e.id) for e in (small(), small(preprocess=Preprocess("none", "truncate"))))
    with pytest.raises(ValueError, match="different features"):
        frechet(a, b)


def test_fashion_compares_with_the_bundled_reference():
    extractor = load_extractor("fashion")
    x = images(60)
    found = extractor.features(x)
    torch.testing.assert_close(found, features(x, FashionClassifier.load()), rtol=1e-5, atol=1e-5)
    assert frechet(Stats.of(found, extractor=extractor.id), Stats.load(REFERENCE)).value > 1
    assert extractor.label == "FD[fashion]"
    with pytest.raises(UserError, match="name a resize"):
        extractor(images(1, 64))


def stationary_images(n: int) -> torch.Tensor:
    """Draws of the law that the cosine basis is made for, around mid-grey."""

    def root(k: int) -> torch.Tensor:
        index = torch.arange(k)
        return torch.linalg.cholesky(0.95 ** (index[:, None] - index).abs())

    noise = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return (0.5 + 0.1 * torch.einsum("ac,hi,wj,ncij->nahw", root(3), root(32), root(32), noise)).clamp(0, 1)


def test_the_cosine_basis_is_orthonormal_and_keeps_what_principal_components_keep():
    assert torch.allclose(cosine(7).T @ cosine(7), torch.eye(7).double(), atol=1e-12)
    basis = pixel_pca(64).network.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(64), rtol=0, atol=1e-5)
    x = stationary_images(1500)
    flat = Preprocess("torch-bicubic")(x, (32, 32)).flatten(1) / 255
    kept = pixel_pca(64)(x).square().mean(dim=0)
    best = torch.linalg.eigvalsh((flat - 0.5).double().T @ (flat - 0.5).double() / len(x)).flip(0)[:64]
    assert 0.95 * best.sum() < kept.sum() < best.sum()
    assert (kept[:-8].sort(descending=True).values[:8] / kept[:8] - 1).abs().max() < 0.2  # in descending order, up to sampling


def test_fitted_components_are_the_eigenvectors():
    x = images(80)
    extractor = pixel_pca(6, side=8, images=x)
    found = extractor(x).double()
    flat = (Preprocess("torch-bicubic")(x, (8, 8)).flatten(1) / 255).double()
    values = torch.linalg.eigvalsh(flat.T.cov()).flip(0)[:6]
    torch.testing.assert_close(found.T.cov(), values.diag(), rtol=1e-3, atol=1e-5)
    assert extractor.id != pixel_pca(6, side=8).id
    with pytest.raises(UserError, match="at least 7"):
        pixel_pca(6, images=x[:6])


def test_random_conv_is_its_seed_and_sees_texture():
    x = images(200, 64)
    assert torch.equal(random_conv(seed=3)(x[:2]), random_conv(seed=3)(x[:2]))
    assert random_conv(seed=3).id != random_conv(seed=4).id
    extractor = random_conv(8)
    blurred = nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    reference, again, other = (Stats.of(extractor(part), extractor=extractor.id) for part in (x[:100], x[100:], blurred[100:]))
    assert frechet(other, reference).value > 20 * frechet(again, reference).value


def test_unknown_extractors_are_refused_and_no_name_is_fid():
    with pytest.raises(UserError, match=r"no feature extractor 'inception'.*inception-2015"):
        load_extractor("inception")
    assert not any("fid" in name.lower() for name in EXTRACTORS)


def test_a_network_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"gave \(2, 5\) for 2 images: expected \[2, 4\]"):
        small(dim=4)(images(2))
