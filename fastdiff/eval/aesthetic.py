"""LAION's aesthetic predictor: a linear stack on the unit image embedding of CLIP ViT-L/14; the caption plays no part.

    s = W5 W4 W3 W2 W1 e + b,   e = CLIP(image) / |CLIP(image)|,   widths 768-1024-128-64-16-1

There are dropouts between the layers and no activations (``simple_inference.py`` of
``christophschuhmann/improved-aesthetic-predictor``), so the score is an affine function of the embedding. Trained on marks from
1 to 10. The weights' name is read in THUDM's ImageReward (``utils.py``); recalled: that these are the weights of most
published tables. The original runs CLIP in half precision on GPUs.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.preference import PreferenceScore, cropped, normalised, pooled
from fastdiff.eval.weights import MODEL_FILES, WeightFile, find_folder, load_state

CLIP = "openai/clip-vit-large-patch14"
FILE = WeightFile(
    names=("sac+logos+ava1-l14-linearMSE.pth",),
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    size="4 MB",
)


class Aesthetic(PreferenceScore):
    """The LAION aesthetic score.

    Args:
        weights: ``sac+logos+ava1-l14-linearMSE.pth`` or its folder; else ``FASTDIFF_WEIGHTS`` and torch's cache.
        clip: the CLIP folder of transformers whose embedding the weights were trained on; by default
            ``openai/clip-vit-large-patch14`` in ``FASTDIFF_WEIGHTS`` or in the Hugging Face cache.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        clip: str | Path | None = None,
        device: str | torch.device = "cpu",
        allow_download: bool = False,
    ) -> None:
        from transformers import AutoModel

        path, _ = FILE.find(weights, allow_download=allow_download)
        folder = find_folder(CLIP, clip, allow_download=allow_download, only=MODEL_FILES)
        head = linear_stack(load_state(path), "layers.", path)
        clip_model = AutoModel.from_pretrained(folder, local_files_only=True)
        width = getattr(clip_model.config, "projection_dim", None)
        if head[0].in_features != width:
            raise UserError(
                f"{path} takes embeddings of {head[0].in_features} numbers and the model in {folder} gives {width}: "
                f"pass clip=FOLDER of {CLIP}."
            )
        self.side: int = clip_model.config.vision_config.image_size
        conventions: dict[str, str | float] = {
            "model": f"{path.name} on {folder.name}",
            "text": "not used",
            "image": f"8 bits, PIL bicubic, shorter side to {self.side}, centre crop",
            "scale": 1.0,
        }
        super().__init__("aesthetic", nn.ModuleDict({"clip": clip_model, "head": head}), conventions, device=device)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(cropped(images, self.side))

    def rate(self, pixels: Tensor, captions: list[str]) -> Tensor:
        found = self.network["clip"].get_image_features(pixel_values=pixels)
        return self.network["head"](F.normalize(pooled(found), dim=1))[:, 0]


def linear_stack(state: Mapping[str, Tensor], prefix: str, path: str | Path) -> nn.Sequential:
    """The linear layers ``<prefix><number>.weight`` and ``.bias`` of ``state`` in order, ending in one number.

    ``UserError`` when they do not fit into one another; ``path`` names the file in it.
    """
    numbers = sorted(int(key[len(prefix) : -len(".weight")]) for key in state if key.startswith(prefix) and key.endswith(".weight"))
    layers: list[nn.Module] = []
    width = None
    for number in numbers:
        weight, bias = state[f"{prefix}{number}.weight"], state.get(f"{prefix}{number}.bias")
        if weight.ndim != 2 or bias is None or width not in (None, weight.shape[1]):
            raise UserError(f"{path} holds no linear stack: {prefix}{number} has {tuple(weight.shape)} after width {width}.")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = weight.shape[0]
    if width != 1:
        raise UserError(f"{path} holds no linear stack that ends in one number: its layers are {numbers or 'none'}.")
    return nn.Sequential(*layers)
