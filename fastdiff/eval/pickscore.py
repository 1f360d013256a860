"""PickScore: exp(logit_scale) times the cosine of image and caption in a CLIP ViT-H/14 tuned on Pick-a-Pic's choices.

(Kirstain et al., "Pick-a-Pic: an open dataset of user preferences for text-to-image generation", NeurIPS 2023,
arXiv:2305.01569.) The formula, the raw caption and its cut at 77 tokens are those of the README of ``yuvalkirstain/PickScore``.
The softmax of the scores of several images of one caption is the probability that people choose each. Recalled, not read: that
the published logit_scale is near log 100, so that scores lie about 20.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.encoders import ImageStatistics
from fastdiff.eval.preference import PreferenceScore, cosines, cropped, normalised, pooled
from fastdiff.eval.weights import MODEL_FILES, TOKENIZER_FILES, find_folder

REPO = "yuvalkirstain/PickScore_v1"


class PickScore(PreferenceScore):
    """PickScore of any CLIP folder of transformers with its tokenizer and ``preprocessor_config.json``.

    Args:
        weights: the folder; by default ``yuvalkirstain/PickScore_v1`` in ``FASTDIFF_WEIGHTS`` or in the Hugging Face cache.
        processor: the folder of tokenizer and preprocessor where ``weights`` has none, such as that of
            ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.
        allow_download: fetch the default when it is nowhere.

    >>> PickScore()(images, captions).view(-1, 4).softmax(dim=1)   # four images a caption: who is chosen
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        processor: str | Path | None = None,
        device: str | torch.device = "cpu",
        allow_download: bool = False,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = find_folder(REPO, weights, allow_download=allow_download, only=MODEL_FILES)
        texts = folder if processor is None else find_folder(str(processor), allow_download=allow_download, only=TOKENIZER_FILES)
        if not any((texts / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
            raise UserError(f"{texts} has no tokenizer: pass processor=FOLDER of the CLIP model that PickScore was tuned from.")
        statistics = ImageStatistics(texts)
        self.mean, self.std = statistics.image_mean, statistics.image_std
        network = AutoModel.from_pretrained(folder, local_files_only=True)
        if not hasattr(network, "get_text_features"):
            raise UserError(f"{folder} holds a {type(network).__name__}: PickScore needs a CLIP model of images and texts.")
        self.side: int = network.config.vision_config.image_size
        self.tokenizer: Any = AutoTokenizer.from_pretrained(texts, local_files_only=True)
        self.length: int = network.config.text_config.max_position_embeddings
        self.scale = network.logit_scale.detach().float().exp().item()
        conventions: dict[str, str | float] = {
            "model": folder.name,
            "text": f"no prefix, cut at {self.length} tokens",
            "image": f"8 bits, PIL bicubic, shorter side to {self.side}, centre crop",
            "scale": self.scale,
        }
        super().__init__("pickscore", network, conventions, device=device)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(cropped(images, self.side, floor=True), self.mean, self.std)

    def rate(self, pixels: Tensor, captions: list[str]) -> Tensor:
        def embed(texts: list[str]) -> Tensor:
            options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
            tokens = self.tokenizer(texts, **options).to(pixels.device)
            return pooled(self.network.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask))

        return self.scale * cosines(pooled(self.network.get_image_features(pixel_values=pixels)), captions, embed)
