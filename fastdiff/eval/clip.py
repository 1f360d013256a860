"""CLIP score: how well an image and its caption agree in a shared embedding.

    cosine(image, prefix + caption), times a scale, clamped at zero or not, averaged over images

(Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning", EMNLP 2021, arXiv:2104.08718.)
Published numbers differ in five choices: the model, the text prefix, the scale, where the clamp stands, and how the
image is prepared. All five are arguments here and stand in the result; a score without them cannot be compared with
another.

| source | model | prefix | prepare | scale | clamp |
|---|---|---|---|---|---|
| CLIPScore | ViT-B/32 | ``"A photo depicts "`` | crop | 2.5 | per_sample |
| torchmetrics | ViT-L/14 | none | crop | 100 | mean |
| DMD2, SwiftBrush v2 | ViT-g-14 laion2b | ``"A photo depicts "`` (DMD2: token level) | crop after LANCZOS to 256 | 1 | none |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.fashion import ASSETS
from fastdiff.eval.preprocess import centre_crop
from fastdiff.eval.stats import Score

FOLDER = ASSETS / "fashion-clip"
Clamp = Literal["per_sample", "mean", "none"]
Prepare = Literal["squash", "crop"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClipValue(Score):
    """A CLIP score, its standard error, and the five choices it depends on."""

    conventions: Mapping[str, str | float]


class ClipScore:
    """The CLIP score of images under one fixed set of conventions.

    Args:
        model: a folder that open_clip loads as a whole (``open_clip_config.json``, weights, tokenizer), or an open_clip
            module.
        tokenizer: texts to ids [B, L]; needed with a module, read from the folder otherwise.
        prefix: put in front of every caption, such as ``"A photo depicts "``.
        scale: factor of the cosine: 100 (torchmetrics), 2.5 (CLIPScore), 1 (DMD2).
        clamp: ``"per_sample"`` max(cosine, 0) of each image (CLIPScore), ``"mean"`` of the mean (torchmetrics),
            ``"none"``.
        prepare: how an image of another size gets the model's: ``"squash"`` both sides, ``"crop"`` the centre after the
            shorter side (CLIP's own), or a function of images [B, 3, H, W] in [0, 1] that goes before ``"crop"`` and is
            recorded by its name. The filter is antialiased bicubic, in float without 8-bit rounding.

    >>> ClipScore()(images, captions)                         # the bundled model: ClipValue(value=..., se=..., ...)
    """

    def __init__(
        self,
        model: str | Path | nn.Module = FOLDER,
        *,
        tokenizer: Any = None,
        prefix: str = "",
        scale: float = 100.0,
        clamp: Clamp = "per_sample",
        prepare: Prepare = "squash",
    ) -> None:
        if clamp not in ("per_sample", "mean", "none"):
            raise ValueError(f"clamp is {clamp!r}: expected 'per_sample', 'mean' or 'none'; they differ on images that fail.")
        if not callable(prepare) and prepare not in ("squash", "crop"):
            raise ValueError(f"prepare is {prepare!r}: expected 'squash', 'crop' or a function; they show the model other pixels.")
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("a CLIP module came without tokenizer: pass tokenizer=..., as another one would give wrong ids.")
            self.name, network = type(model).__name__, model
        else:
            self.name, (network, tokenizer) = Path(model).name, load(Path(model))
        self.model: Any = network.eval().requires_grad_(False)
        self.tokenizer, self.prefix, self.scale, self.clamp, self.way = tokenizer, prefix, scale, clamp, prepare

    @property
    def conventions(self) -> dict[str, str | float]:
        """The five choices that a number depends on."""
        way = f"{getattr(self.way, '__name__', 'function')}, then crop" if callable(self.way) else self.way
        image = f"float in [0, 1], antialiased bicubic {way} to {self.size[0]}x{self.size[1]}"
        return {"model": self.name, "prefix": self.prefix, "scale": self.scale, "clamp": self.clamp, "image": image}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @torch.inference_mode()
    def cosines(self, images: Tensor, captions: list[str], *, batch_size: int = 250) -> Tensor:
        """Cosine [B] of each of ``images`` [B, 3, H, W] in [0, 1] with its own caption."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions: expected one caption an image.")
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        ids = self.tokenizer([self.prefix + caption for caption in distinct])
        text = torch.cat([self.model.encode_text(part, normalize=True) for part in ids.split(batch_size)])
        image = torch.cat([self.model.encode_image(self.prepare(part), normalize=True) for part in images.split(batch_size)])
        return (image * text[[distinct[caption] for caption in captions]]).sum(dim=1)

    def prepare(self, images: Tensor) -> Tensor:
        """``images`` in [0, 1] at the model's size and normalised as the model was trained."""
        images = self.way(images) if callable(self.way) else images
        if tuple(images.shape[2:]) != self.size:
            images = _bicubic(images, self.size) if self.way == "squash" else _crop(images, self.size)
        mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (self.model.visual.image_mean, self.model.visual.image_std))
        return (images - mean) / std

    def __call__(self, images: Tensor, captions: list[str]) -> ClipValue:
        """The score of ``images`` [B, 3, H, W] in [0, 1] and their captions, with its standard error."""
        score = reduce(self.cosines(images, captions), scale=self.scale, clamp=self.clamp)
        return ClipValue(score.value, score.se, self.conventions)


def reduce(cosines: Tensor, *, scale: float, clamp: Clamp) -> Score:
    """Cosines [B] to a score: scaled, clamped where ``clamp`` says, averaged."""
    if clamp == "per_sample":
        cosines = cosines.clamp(min=0)
    score = Score.of(scale * cosines)
    return Score(max(score.value, 0.0), score.se) if clamp == "mean" else score


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def _crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of ``size`` after a resize that keeps the aspect and just covers it, the long side rounded down (torchvision)."""
    (height, width), (h, w) = images.shape[2:], size
    factor = max(h / height, w / width)
    images = _bicubic(images, (max(h, int(height * factor)), max(w, int(width * factor))))
    return centre_crop(images, size)


def load(folder: Path) -> tuple[nn.Module, Any]:
    """An open_clip model and its tokenizer from a folder, without network; ``ValueError`` when it is none."""
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{folder} is no open_clip folder: it has no open_clip_config.json. Pass the folder of a saved model.")
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")
