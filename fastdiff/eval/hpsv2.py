"""HPS v2: the cosine of image and caption in a CLIP ViT-H/14 tuned on Human Preference Dataset v2.

(Wu et al., "Human Preference Score v2", 2023, arXiv:2306.09341.) Model, raw caption, cosine without scale, and the image's way are
those of the package hpsv2 1.2.0 (``img_score.py``, ``src/open_clip/transform.py``): ``score`` takes v2.0 by default and
``evaluate`` v2.1, the longest side is resized to 224 and the rest is black. There the resize runs on a float tensor with
torchvision's default antialias, which releases before 0.17 do not have, under autocast on GPUs; here it is antialiased, in
float32. Published tables print the score times 100.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.preference import PreferenceScore, cosines, letterboxed, normalised
from fastdiff.eval.weights import WeightFile, load_state

REPO = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(PreferenceScore):
    """HPS v2.0 or v2.1 on open_clip's network.

    Args:
        weights: the file ``HPS_v2.1_compressed.pt`` (or of v2.0), or its folder; else ``FASTDIFF_WEIGHTS`` and the caches.
        version: part of the name; their values differ.
        model: an open_clip architecture, or a module with ``tokenizer`` into which the weights go.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        version: str = "v2.1",
        model: str | nn.Module = "ViT-H-14",
        tokenizer: Any = None,
        device: str | torch.device = "cpu",
        allow_download: bool = False,
    ) -> None:
        import open_clip

        if version not in FILES:
            raise UserError(f"no HPS {version!r}: expected {' or '.join(FILES)}.")
        name = FILES[version]
        file = WeightFile(names=(name,), url=f"https://huggingface.co/{REPO}/resolve/main/{name}", size="about 2 GB", repo=REPO)
        path, _ = file.find(weights, allow_download=allow_download)
        architecture = model if isinstance(model, str) else type(model).__name__
        network: Any = open_clip.create_model(model, pretrained=None) if isinstance(model, str) else model
        self.tokenizer = tokenizer or open_clip.get_tokenizer(architecture)
        state = load_state(path)
        try:
            network.load_state_dict(state.get("state_dict", state))
        except RuntimeError as error:
            raise UserError(f"{path} holds no weights of {architecture}: {' '.join(str(error).split())[:200]}") from error
        size = network.visual.image_size
        self.side: int = size if isinstance(size, int) else size[0]
        conventions: dict[str, str | float] = {
            "model": f"{path.name}, {architecture}",
            "text": f"no prefix, cut at {network.context_length} tokens",
            "image": f"float, antialiased bicubic, longer side to {self.side}, black margins",
            "scale": 1.0,
        }
        super().__init__(f"hps{version}", network, conventions, device=device)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(letterboxed(images, self.side))

    def rate(self, pixels: Tensor, captions: list[str]) -> Tensor:
        def embed(texts: list[str]) -> Tensor:
            return self.network.encode_text(self.tokenizer(texts).to(pixels.device))

        return cosines(self.network.encode_image(pixels), captions, embed)
