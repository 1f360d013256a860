"""Feature extractors by name, as protocols write them.

>>> load_extractor("fashion")                                            # bundled
>>> load_extractor("inception-2015", preprocess="tf1", weights="pt_inception-2015-12-05-6726825d.pth")
>>> load_extractor("dinov2-vitl14")
>>> load_extractor("open_clip", model="folder")
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.classifier import WEIGHTS, FashionClassifier
from fastdiff.eval.encoders import DINOV2, classifier, dinov2, hf_classifier, huggingface_clip, open_clip_model
from fastdiff.eval.extractor import INCEPTION, FeatureExtractor
from fastdiff.eval.fashion import extractor_name
from fastdiff.eval.inception import inception
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.weightless import pixel_pca, random_conv


class _Fashion(nn.Module):
    def __init__(self, network: FashionClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, levels: Tensor) -> Tensor:
        return self.network.features(levels / 255)


def fashion(weights: str | Path = WEIGHTS) -> FeatureExtractor:
    """The bundled classifier's 32 features of 32x32 images; its ``id`` is that of the bundled reference statistics."""
    network = FashionClassifier.load(Path(weights))
    return FeatureExtractor(
        name="fashion",
        network=_Fashion(network),
        preprocess=Preprocess("none", "none"),
        dim=network.num_features,
        size=(32, 32),
        key=extractor_name(network),
    )


EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {
    "fashion": fashion,
    INCEPTION: inception,
    **{f"dinov2-{arch}": partial(dinov2, arch) for arch in DINOV2},
    "open_clip": open_clip_model,
    "huggingface-clip": huggingface_clip,
    "classifier": classifier,
    "hf-classifier": hf_classifier,
    "pixel-pca": pixel_pca,
    "random-conv": random_conv,
}


def load_extractor(name: str, **options: Any) -> FeatureExtractor:
    """The extractor ``name`` with the options of its function; ``UserError`` for a name that is none."""
    if name not in EXTRACTORS:
        raise UserError(f"no feature extractor {name!r}: expected one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](**options)
