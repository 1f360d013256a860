"""The bundled feature network of the ``fashion`` world: a small residual classifier of the ten garments.

It is trained on garments in random colours, so that class and features do not depend on colour; its 32 penultimate
features are the space of ``FD[fashion]``. Trained by ``trainers/fashion_classifier.py``.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.data.fashion import ASSETS, GARMENTS

WEIGHTS = ASSETS / "fashion-classifier.safetensors"


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(width_in, width, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.skip(x)).relu()


class FashionClassifier(nn.Module):
    """RGB [B, 3, 32, 32] in [0, 1] to garment logits [B, 10]; ``features`` gives the penultimate [B, 32]."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(_Block(32, 64), _Block(64, 96))
        self.neck = nn.Linear(96, self.num_features)
        self.head = nn.Linear(self.num_features, len(GARMENTS))

    def features(self, images: Tensor) -> Tensor:
        return self.neck(self.blocks(self.stem(2 * images - 1)).mean(dim=(2, 3))).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "FashionClassifier":
        """The bundled network, frozen and in eval mode."""
        from safetensors.torch import load_file

        network = cls()
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)


def accuracy(network: FashionClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images [B, 3, 32, 32] whose most likely class is the label."""
    with torch.inference_mode():
        return (torch.cat([network(x) for x in images.split(500)]).argmax(1) == labels).float().mean().item()
