"""``Clip``: how well images fit texts, differentiable in the images, by a frozen open_clip model.

>>> clip = load_clip("fashion")                     # bundled; a folder with open_clip_config.json; or "ViT-B-32/openai"
>>> clip(images, ["a red boot", "a blue bag"])      # cosines [2] of images [2, 3, H, W] in [0, 1], each with its own text
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError

BUNDLED_CLIP = {"fashion": Path(__file__).parent.parent / "assets" / "fashion-clip"}


class Clip:
    """The cosine of each image [B, 3, H, W] in [0, 1] with its own text, [B], float32 or better.

    Images are resized to the model's input by antialiased bicubic interpolation, both sides, and normalised as it was trained.

    Args:
        model: an open_clip module; it is frozen and put into eval mode.
        tokenizer: texts to ids [B, L].
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str = "clip") -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name

    def __repr__(self) -> str:
        return f"Clip({self.name})"

    def to(self, device: torch.device | str) -> "Clip":
        """Move the model."""
        self.model.to(device)
        return self

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: expected one text an image.")
        seen = self.features(images)
        return (seen * self.directions(texts).to(seen)).sum(dim=1)

    @property
    def scale(self) -> float:
        """What cosines are multiplied with in the softmax that the model was trained by."""
        return float(self.model.logit_scale.exp())

    def features(self, images: Tensor) -> Tensor:
        """Unit features of ``images`` [B, E]."""
        return _direction(self.model.encode_image(self.prepared(images)))

    @torch.no_grad()
    def directions(self, texts: list[str]) -> Tensor:
        """Unit features of ``texts``, one row each [B, E]; each distinct text is encoded once."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        device = next(self.model.parameters()).device
        features = _direction(self.model.encode_text(self.tokenizer(list(distinct)).to(device)))
        return features[[distinct[text] for text in texts]]

    def prepared(self, images: Tensor) -> Tensor:
        """``images`` as the model takes them."""
        size = self.model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        images = images.to(next(self.model.parameters()).dtype)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(v).to(images)[:, None, None] for v in (self.model.visual.image_mean, self.model.visual.image_std))
        return (images - mean) / std


def _direction(features: Tensor) -> Tensor:
    return F.normalize(features if features.itemsize >= 4 else features.float(), dim=1)


def load_clip(name: str) -> Clip:
    """A CLIP by bundled name, by folder, or as ``architecture/weights`` of open_clip, which fetches what it does not have.

    Raises:
        UserError: it is none of these.
    """
    import open_clip

    folder = BUNDLED_CLIP.get(name, Path(name))
    if (folder / "open_clip_config.json").is_file():
        source = f"local-dir:{folder}"
        model, _, _ = open_clip.create_model_and_transforms(source)
        return Clip(model, open_clip.get_tokenizer(source), name=name)
    architecture, _, weights = name.rpartition("/")
    if (architecture, weights) not in open_clip.list_pretrained():
        raise UserError(
            f"no CLIP {name}: it is no folder with open_clip_config.json, and open_clip has no weights {weights!r} for an "
            f"architecture {architecture!r}. Bundled: {', '.join(BUNDLED_CLIP)}; open_clip's are named like ViT-B-32/openai."
        )
    model, _, _ = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    return Clip(model, open_clip.get_tokenizer(architecture), name=name)
