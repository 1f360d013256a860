"""ImageReward: BLIP reads the caption while it looks at the image, and a linear stack marks what it makes of both.

    s = (W5 W4 W3 W2 W1 h + b - 0.16717362830052426) / 1.0333394966054072,   h = BLIP's text state at [CLS], widths 768-..-1

(Xu et al., "ImageReward: learning and evaluating human preferences for text-to-image generation", NeurIPS 2023,
arXiv:2304.05977.) Formula, constants, crop, and the caption's 35 tokens are those of the package image-reward 1.5
(``ImageReward.py``). That package imports ``find_pruneable_heads_and_indices``, which transformers 5 has no more, so the
published weights are put into transformers' own BLIP here: ViT-L/16 with layer norms of eps 1e-6, BERT with cross-attention in
every layer. Widths and depths are read off the weights, heads are 64 wide in both. Recalled, not read: BERT's eps of 1e-12
(``med_config.json``).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.aesthetic import linear_stack
from fastdiff.eval.preference import PreferenceScore, cropped, normalised
from fastdiff.eval.weights import TOKENIZER_FILES, WeightFile, find_folder, load_state

MEAN, SD = 0.16717362830052426, 1.0333394966054072
TOKENS, HEAD = 35, 64
TOKENIZER, REPO = "bert-base-uncased", "THUDM/ImageReward"
FILE = WeightFile(
    names=("ImageReward.pt",), url=f"https://huggingface.co/{REPO}/resolve/main/ImageReward.pt", size="1.8 GB", repo=REPO
)
_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward(PreferenceScore):
    """ImageReward v1.0; about 0 for an average image of its training set, 1 a standard deviation better.

    Args:
        weights: ``ImageReward.pt`` or its folder; else ``FASTDIFF_WEIGHTS`` and the caches.
        tokenizer: the folder of ``bert-base-uncased``'s tokenizer; else ``FASTDIFF_WEIGHTS`` and the Hugging Face cache.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        allow_download: bool = False,
    ) -> None:
        from transformers import BertTokenizer

        path, _ = FILE.find(weights, allow_download=allow_download)
        words = find_folder(TOKENIZER, tokenizer, allow_download=allow_download, only=TOKENIZER_FILES)
        network = Reward(load_state(path), path)
        self.tokenizer: Any = BertTokenizer.from_pretrained(words, local_files_only=True)
        self.side: int = network.side
        conventions: dict[str, str | float] = {
            "model": path.name,
            "text": f"no prefix, cut at {TOKENS} tokens",
            "image": f"8 bits, PIL bicubic, shorter side to {self.side}, centre crop",
            "scale": 1 / SD,
        }
        super().__init__("imagereward", network, conventions, device=device)

    def prepare(self, images: Tensor) -> Tensor:
        return normalised(cropped(images, self.side))

    def rate(self, pixels: Tensor, captions: list[str]) -> Tensor:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(captions, **options).to(pixels.device)
        return self.network(pixels, tokens.input_ids, tokens.attention_mask)


class Reward(nn.Module):
    """BLIP's two encoders and the linear stack, filled from the published ``state``; ``UserError`` when tensors are missing."""

    def __init__(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision, text = _renamed(state, _VISION, _RENAMED), _renamed(state, _TEXT, ())
        text.pop("embeddings.position_ids", None)  # a counter, which newer releases do not store
        try:
            self.vision: Any = BlipVisionModel(BlipVisionConfig(**_vision_shape(vision)))
            self.text: Any = BlipTextModel(BlipTextConfig(**_text_shape(text)), add_pooling_layer=False)
            self.vision.load_state_dict(vision)
            self.text.load_state_dict(text)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path} holds no ImageReward weights: {' '.join(str(error).split())[:200]}") from error
        self.mlp = linear_stack(state, "mlp.layers.", path)
        self.side: int = self.vision.config.image_size

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B] of normalised images [B, 3, h, w] and token ids [B, L] with their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        state = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.mlp(state[:, 0])[:, 0] - MEAN) / SD


def _renamed(state: Mapping[str, Tensor], prefix: str, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if key.startswith(prefix):
            new = key[len(prefix) :]
            for old, name in names:
                new = re.sub(old, name, new)
            found[new] = value
    return found


def _vision_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    side = round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch
    return {
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _depth(state, "encoder.layers."),
        "num_attention_heads": width // HEAD,
        "image_size": side,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }


def _text_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _depth(state, "encoder.layer."),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": state["embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    }


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))
