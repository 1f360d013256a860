"""``FreeImages``: particles that are samples themselves."""

import torch
from torch import Tensor

from fastdiff.models.scenes.base import Scenes, normal
from fastdiff.models.scenes.camera import Camera


class FreeImages(Scenes):
    """``x = samples[index]`` [B, *shape], the same for every camera; they start as standard normal noise."""

    kind = "images"
    samples: Tensor

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"samples": normal(generator, self.n, *self.shape)}

    def forward(self, index: Tensor, camera: Camera) -> Tensor:
        del camera
        return self.samples[index]
