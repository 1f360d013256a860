"""CLIP score: how well an image and its caption agree in a shared embedding.

    cosine(image, prefix + caption), times a scale, clamped at zero or not, averaged over images

(Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning", EMNLP 2021, arXiv:2104.08718.)
Published numbers differ in five choices: the model, the text prefix, the scale, where the clamp stands, and how the
image is prepared. All five are arguments here and appear in ``ClipScore.conventions``; a score without them cannot be
compared with another.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.fashion import ASSETS
from fastdiff.eval.stats import Score

FOLDER = ASSETS / "fashion-clip"
Clamp = Literal["per_sample", "mean", "none"]


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

    Images of another size than the model's are squashed to it by an antialiased bicubic filter in float, without 8-bit
    rounding.

    >>> ClipScore()(images, captions)                         # the bundled model: Score(value=..., se=...)
    """

    def __init__(
        self,
        model: str | Path | nn.Module = FOLDER,
        *,
        tokenizer: Any = None,
        prefix: str = "",
        scale: float = 100.0,
        clamp: Clamp = "per_sample",
    ) -> None:
        if clamp not in ("per_sample", "mean", "none"):
            raise ValueError(f"clamp is {clamp!r}: expected 'per_sample', 'mean' or 'none'; they differ on images that fail.")
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("a CLIP module came without tokenizer: pass tokenizer=..., as another one would give wrong ids.")
            self.name, network = type(model).__name__, model
        else:
            self.name, (network, tokenizer) = Path(model).name, load(Path(model))
        self.model: Any = network.eval().requires_grad_(False)
        self.tokenizer, self.prefix, self.scale, self.clamp = tokenizer, prefix, scale, clamp

    @property
    def conventions(self) -> dict[str, str | float]:
        """The five choices that a number depends on."""
        image = f"float in [0, 1], antialiased bicubic squash to {self.size[0]}x{self.size[1]}"
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
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (self.model.visual.image_mean, self.model.visual.image_std))
        return (images - mean) / std

    def __call__(self, images: Tensor, captions: list[str]) -> Score:
        """The score of ``images`` [B, 3, H, W] in [0, 1] and their captions, with its standard error."""
        return reduce(self.cosines(images, captions), scale=self.scale, clamp=self.clamp)


def reduce(cosines: Tensor, *, scale: float, clamp: Clamp) -> Score:
    """Cosines [B] to a score: scaled, clamped where ``clamp`` says, averaged."""
    if clamp == "per_sample":
        cosines = cosines.clamp(min=0)
    score = Score.of(scale * cosines)
    return Score(max(score.value, 0.0), score.se) if clamp == "mean" else score


def load(folder: Path) -> tuple[nn.Module, Any]:
    """An open_clip model and its tokenizer from a folder, without network; ``ValueError`` when it is none."""
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{folder} is no open_clip folder: it has no open_clip_config.json. Pass the folder of a saved model.")
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")
