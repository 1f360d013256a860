"""The Inception port against torchvision's blocks with the three published patches, on random weights of the real layout."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastdiff.errors import UserError
from fastdiff.eval import inception as port
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.inception import Inception, inception
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.weights import sha256


@pytest.fixture(scope="module")
def network(inception_network) -> Inception:
    return inception_network


@pytest.fixture(scope="module")
def weights(inception_weights):
    return inception_weights


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def patched_torchvision(state) -> nn.Module:
    """Torchvision's network, each pooled branch computed again as the TensorFlow graph has it."""
    models = pytest.importorskip("torchvision.models.inception")
    network = models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.load_state_dict(state)

    def patch(block: nn.Module, pool) -> None:
        original = block._forward
        block._forward = lambda x: [*original(x)[:-1], block.branch_pool(pool(x))]

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        block = getattr(network, f"Mixed_{name}")
        patch(block, lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
    patch(network.Mixed_7c, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
    return network.eval()


def test_every_layer_is_that_of_the_patched_torchvision_network(network, weights, images):
    oracle, seen = patched_torchvision(network.state_dict()), {}
    oracle.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, out: seen.update(spatial=out))
    oracle.avgpool.register_forward_hook(lambda _m, _i, out: seen.update(pool=out))
    x = (Preprocess("tf1")(images, (299, 299)) - 128) / 128
    with torch.inference_mode():
        logits = oracle(x)
    pool = seen["pool"].flatten(1)
    expected = {
        "pool": pool,
        "logits": logits,
        "logits_unbiased": logits - oracle.fc.bias,
        "mixed_6": seen["spatial"][:, :7].permute(0, 2, 3, 1).reshape(2, 17 * 17 * 7),
    }
    assert 0.01 < pool.std() < 1000
    assert logits.std() < 1000  # the bias is within the tolerance of larger ones
    for layer, values in expected.items():
        found = inception(weights, preprocess="tf1", layer=layer, verify=False)(images)
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4 * values.abs().max().item())
    plain = patched_torchvision(network.state_dict())
    del plain.Mixed_7c._forward  # an average in the last block, as in torchvision
    with torch.inference_mode():
        assert (plain(x) - logits).abs().max() > 1e-2 * logits.abs().max()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_torchscript_gives_the_same_features(network, weights, images, tmp_path):
    class Script(nn.Module):
        """As in clean-fid's file: the network without its scaling is ``layers``."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = network

        def forward(self, x):
            return self.layers((x - 128) / 128)

    whole, bare = tmp_path / "inception-2015-12-05.pt", tmp_path / "traced.pt"
    x = torch.zeros(1, 3, 299, 299)
    torch.jit.trace(Script(), x).save(str(whole))
    torch.jit.trace(network, x).save(str(bare))
    expected = inception(weights, verify=False)(images[:1])
    for path in (whole, bare):
        torch.testing.assert_close(inception(path, verify=False)(images[:1]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="pool layer only"):
        inception(bare, layer="logits", verify=False)


def test_ranges_are_those_of_the_publications(weights):
    white = torch.ones(1, 3, 299, 299)
    seen = []
    for name in ("clean", "tf1", "pytorch-fid"):
        extractor = inception(weights, preprocess=name, verify=False)
        extractor.network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].max().item()))
        extractor(white)
    assert seen == [127 / 128, 127 / 128, 1.0]


def test_only_published_weights_and_a_published_preprocess_are_called_fid(weights, monkeypatch):
    own = inception(weights, verify=False)
    assert own.label.startswith("FD[inception-2015#")
    with pytest.raises(UserError, match=r"truncated or another network.*verify=False"):
        inception(weights)
    monkeypatch.setattr(port, "WEIGHTS", dataclasses.replace(port.WEIGHTS, sha256=(sha256(weights),)))
    published = inception(weights)
    assert (published.id, published.label) == ("inception-2015;clean", "FID[clean]")

    def label(preprocess: str, layer: str = "pool") -> str:
        shown = dataclasses.replace(published, preprocess=Preprocess.parse(preprocess), layer=layer)
        return shown.label

    assert label("lanczos256-centre:truncate") == "FID[lanczos256-centre:truncate]"
    assert label("torch-bicubic") == "FD[inception-2015;torch-bicubic]"
    assert label("clean:none") == "FD[inception-2015;clean:none]"
    assert not dataclasses.replace(published, published=False, digest="").is_fid
    assert label("tf1", "mixed_6") == "FD[inception-2015/mixed_6;tf1]"


def test_the_digest_does_not_depend_on_the_file_format(network, weights, tmp_path):
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    assert inception(tmp_path / "inception.safetensors", verify=False).id == inception(weights, verify=False).id


def test_torchvision_weights_of_another_layout_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no Inception of 2015.*another FID"):
        inception(tmp_path / "other.pth", verify=False)
    with pytest.raises(UserError, match="no layer 'pool3'"):
        inception(tmp_path / "other.pth", layer="pool3")


def test_batch_size_one_equals_more(weights, images):
    """Exact in the arithmetic, not to the bit: a batch of another size may take another convolution kernel."""
    extractor: FeatureExtractor = inception(weights, verify=False)
    one, many = extractor.features(images, batch_size=1), extractor.features(images, batch_size=2)
    assert ((one - many).abs().max() / many.abs().max()).item() < 1e-5
