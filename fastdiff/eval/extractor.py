"""A feature network with everything its features depend on: preprocess, layer, weights, precision.

    features = network(preprocess(images)),   float32, eval mode, no autocast, no TF32

Features of two extractors are comparable when their ``id`` is equal, and that is what ``Stats.extractor`` holds. A Frechet
distance is called FID only for the Inception network of 2015 with its published weights, its pool layer and a published
preprocess; every other one is ``FD[name]``, because the number is another one.
(Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017, arXiv:1706.08500.)
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.eval.preprocess import Preprocess, Size

INCEPTION = "inception-2015"
_PUBLISHED = re.compile(r"(clean|tf1|pytorch-fid|lanczos\d+-centre)(:truncate)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureExtractor:
    """Images [B, 3, H, W] in [0, 1] to features [B, dim] in float32.

    Args:
        name: what the score is called by, such as ``"dinov2-vitl14"``.
        network: levels [B, 3, h, w] in [0, 255] to features [B, dim]; it is frozen and put into float32 here.
        size: the network's input, or None when it takes any.
        layer: where in the network the features are read.
        published: the weights are a file whose SHA-256 is published.
        digest: first eight hex digits of the weights' SHA-256; part of ``id`` unless the weights are published.
        key: replaces ``id``, for statistics that were written before extractors had one.

    >>> extractor = load_extractor("random-conv")
    >>> Stats.of(extractor.features(images), extractor=extractor.id)
    """

    name: str
    network: nn.Module
    preprocess: Preprocess
    dim: int
    size: Size | None = None
    layer: str = "pool"
    published: bool = False
    digest: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        self.network.eval().float().requires_grad_(False)

    @property
    def id(self) -> str:
        """``name[/layer][#digest];preprocess``: equal exactly when features may be compared."""
        layer = "" if self.layer == "pool" else f"/{self.layer}"
        digest = "" if self.published or not self.digest else f"#{self.digest}"
        return self.key or f"{self.name}{layer}{digest};{self.preprocess.id}"

    @property
    def is_fid(self) -> bool:
        """Whether a Frechet distance of these features is what publications call FID."""
        return self.id == f"{INCEPTION};{self.preprocess.id}" and self.published and bool(_PUBLISHED.fullmatch(self.preprocess.id))

    @property
    def label(self) -> str:
        """``FID[clean]`` or ``FD[name]``; ``Protocol.label`` adds the number of images and the hash."""
        if self.is_fid:
            return f"FID[{self.preprocess.id}]"
        return f"FD[{self.name if self.key else self.id}]"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, dim] of ``images`` [B, 3, H, W] in [0, 1], on the device of the network."""
        return self.of_levels(self.preprocess(images.to(self._device(images)), self.size))

    @torch.inference_mode()
    def of_levels(self, levels: Tensor) -> Tensor:
        """Features [B, dim] of the network's own input ``levels`` [B, 3, h, w] in [0, 255], preprocessed already."""
        device = self._device(levels)
        self.network.eval()  # a parent's .train() reaches it, and batch norm would then depend on the batch
        with torch.autocast(device.type, enabled=False), no_tf32():
            found = self.network(levels.to(device))
        if found.shape != (len(levels), self.dim):
            raise ValueError(f"{self.id} gave {tuple(found.shape)} for {len(levels)} images: expected [{len(levels)}, {self.dim}].")
        return found.float()

    def _device(self, images: Tensor) -> torch.device:
        return next((p.device for p in self.network.parameters()), images.device)

    def features(self, images: Tensor, *, batch_size: int = 64, progress: Callable[[int], None] | None = None) -> Tensor:
        """Features [N, dim] of all ``images`` on the CPU; ``progress`` is called with the number of images just done."""
        done = []
        for part in images.split(batch_size):
            done.append(self(part).cpu())
            if progress:
                progress(len(part))
        return torch.cat(done)


@contextmanager
def no_tf32() -> Iterator[None]:
    """Ten bits of mantissa in a GPU's convolutions move FD; two machines would then disagree."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
