"""Our numbers against those of the packages people know, on the same features, weights and pixels.

pip install 'fastdiff[oracles]'; each test skips without its package. Features are float64 wherever the package lets them be, so
that a tolerance is about arithmetic and not about precision.
"""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.frechet import frechet
from fastdiff.eval.images import features_of_folder
from fastdiff.eval.inception import inception
from fastdiff.eval.inception_score import inception_score
from fastdiff.eval.kid import kid
from fastdiff.eval.mind import mind
from fastdiff.eval.prdc import prdc
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.stats import Stats

D = 12


def features(n: int, seed: int, *, d: int = D, mean: float = 0.0) -> Tensor:
    """[n, d] float64 with correlated columns of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64) / d**0.5
    return mean + torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * torch.linspace(0.2, 2, d, dtype=torch.float64)


X, Y = features(300, 0), features(400, 1, mean=0.3)


class Identity(nn.Module):
    num_features = D

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Mean and covariance of both sets for functions that pass ``disp`` to scipy's root, which SciPy 1.18 no longer takes."""
    root = scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda a, disp=True: root(a) if disp else (root(a), 0.0))
    return [value for f in (X.numpy(), Y.numpy()) for value in (f.mean(0), np.cov(f, rowvar=False))]


def ours(x: Tensor = X, y: Tensor = Y, **options: Any) -> float:
    return frechet(Stats.of(x, extractor="x"), Stats.of(y, extractor="x"), **options).value


def test_frechet_of_torchmetrics():
    metric = FrechetInceptionDistance(feature=Identity(), normalize=True).set_dtype(torch.float64)
    metric.update(Y, real=True)
    metric.update(X, real=False)
    assert ours() == pytest.approx(metric.compute().item(), rel=1e-9)


def test_frechet_of_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (module.fid_features_to_statistics(f) for f in (X, Y))
    theirs = module.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert ours() == pytest.approx(theirs, rel=1e-9)


def test_frechet_of_torch_fidelity_with_fewer_images_than_features():
    """Their eigenvalues of S_1 S_2 that should be zero leave roots of round-off, sqrt(1e-16), some forty times."""
    module = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = features(30, 2, d=48), features(40, 3, d=48, mean=0.3)
    a, b = (module.fid_features_to_statistics(f) for f in (x, y))
    theirs = module.fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert ours(x, y, features=x) == pytest.approx(theirs, rel=1e-6)


def test_frechet_of_pytorch_fid(moments):
    module = pytest.importorskip("pytorch_fid.fid_score")
    assert ours() == pytest.approx(module.calculate_frechet_distance(*moments), rel=1e-9)


def test_frechet_of_clean_fid(moments):
    module = pytest.importorskip("cleanfid.fid")
    assert ours() == pytest.approx(module.frechet_distance(*moments), rel=1e-9)
    assert ours() == pytest.approx(module.fid_from_feats(X.numpy(), Y.numpy()), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save:UserWarning")
def test_kernel_distance_of_torchmetrics():
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300, normalize=True).set_dtype(torch.float64)
    metric.update(Y[:300], real=True)
    metric.update(X, real=False)
    assert kid(X, Y[:300], subset_size=300).value == pytest.approx(metric.compute()[0].item(), rel=1e-10)


def test_kernel_distance_of_torch_fidelity_to_its_seed():
    module = pytest.importorskip("torch_fidelity.metric_kid")
    options = {"kid_subsets": 20, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
    theirs, found = module.kid_features_to_metric(X, Y, **options), kid(X, Y, subsets=20, subset_size=50)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert found.sd == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)


def test_kernel_distance_of_clean_fid():
    module = pytest.importorskip("cleanfid.fid")
    theirs = module.kernel_distance(Y[:300].numpy(), X.numpy(), num_subsets=1, max_subset_size=300)
    assert kid(X, Y[:300], subset_size=300).value == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_of_the_prdc_package(k):
    package = pytest.importorskip("prdc")
    theirs, found = package.compute_prdc(Y.numpy(), X.numpy(), nearest_k=k), prdc(X, Y, k=k)
    assert 0.05 < found.recall < 0.95
    assert {name: getattr(found, name) for name in theirs} == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("saves_memory", [False, True])
def test_precision_and_recall_of_torch_fidelity(saves_memory):
    """Theirs counts the border of a ball and ours does not: of features without ties both are the same."""
    module = pytest.importorskip("torch_fidelity.metric_prc")
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": saves_memory, "verbose": False}
    theirs, found = module.prc_features_to_metric(X, Y, **options), prdc(X, Y, k=3)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)  # float32 means


def test_inception_score_of_torch_fidelity_to_its_seed():
    module = pytest.importorskip("torch_fidelity.metric_isc")
    theirs, found = module.isc_features_to_metric(2 * X[:103], 10, True, 2020), inception_score(2 * X[:103])
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert found.sd == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_mind_of_torch_fidelity_to_its_seed():
    module = pytest.importorskip("torch_fidelity.metric_mind", reason="torch-fidelity has MIND from version 0.5 on")
    theirs = module.mind_features_to_metric(X, Y, mind_num_projections=1000, cuda=False, rng_seed=2020, verbose=False)
    assert mind(X, Y) == pytest.approx(theirs["monge_inception_distance"], rel=1e-5)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(256, (2, 3, 44, 60), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def assert_equal_features(found: Tensor, theirs: Tensor, tolerance: float) -> None:
    """To a share ``tolerance`` of the largest feature."""
    assert theirs.std() > 0.01
    torch.testing.assert_close(found, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_network_and_resize_of_pytorch_fid(inception_weights, pixels, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda url, progress: torch.load(inception_weights))
    network = module.InceptionV3([module.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval().double()
    extractor = inception(inception_weights, preprocess="pytorch-fid", verify=False)
    levels = extractor.preprocess.resize(pixels[:1].double(), extractor.size)
    with torch.inference_mode():
        theirs, found = network(pixels[:1].double() / 255)[0].flatten(1), extractor.network.double()(levels)
    assert_equal_features(found, theirs, 1e-10)


def test_network_and_resize_of_torch_fidelity(inception_weights, pixels):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    names = {"pool": "2048", "logits": "logits", "logits_unbiased": "logits_unbiased"}
    network = module.FeatureExtractorInceptionV3("x", list(names.values()), feature_extractor_weights_path=str(inception_weights))
    with torch.inference_mode():
        for layer, theirs in zip(names, network(pixels), strict=True):
            found = inception(inception_weights, preprocess="tf1", layer=layer, verify=False)(pixels / 255)
            assert_equal_features(found, theirs, 1e-5)  # float32 sums in another order


SIZES = [(64, 64), (299, 200), (333, 512)]


@pytest.mark.parametrize("size", SIZES)
def test_resize_of_clean_fid(size):
    module = pytest.importorskip("cleanfid.resize")
    levels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    images = levels.permute(2, 0, 1)[None] / 255
    for mode, name in (("clean", "clean"), ("legacy_pytorch", "pytorch-fid")):
        theirs = torch.from_numpy(module.build_resizer(mode)(levels.numpy()))
        found = Preprocess(name)(images, (299, 299))[0].permute(1, 2, 0)
        torch.testing.assert_close(found, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", SIZES)
def test_grid_of_torch_fidelity_to_the_bit(size):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    levels = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(7)).float()
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(levels, size=(299, 299), align_corners=False)
    assert torch.equal(Preprocess("tf1")(levels / 255, (299, 299)), theirs)


class Rows(nn.Module):
    """Levels [B, 3, 299, 299] to the means of their rows."""

    def forward(self, levels: Tensor) -> Tensor:
        return levels.mean(dim=3).flatten(1)


def test_folder_of_clean_fid(tmp_path):
    module = pytest.importorskip("cleanfid.fid")
    for i, mode in enumerate(("RGB", "L", "P", "1", "RGB", "CMYK")):
        noise = np.random.default_rng(i).integers(256, size=(50 + i, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    extractor = FeatureExtractor(name="rows", network=Rows(), preprocess=Preprocess("clean"), dim=897, size=(299, 299))
    theirs = module.get_folder_features(str(tmp_path), extractor.network, num_workers=0, device="cpu", verbose=False)
    found = features_of_folder(tmp_path, extractor, workers=0)  # up to ten files both orders are the same
    np.testing.assert_allclose(found.numpy(), theirs, rtol=0, atol=2e-4)
