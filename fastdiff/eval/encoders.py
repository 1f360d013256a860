"""Feature extractors of other libraries: DINOv2 through timm, open_clip, Hugging Face CLIP and SigLIP, any classifier.

None of their Frechet distances is FID. FD-DINOv2 is the one in wide use (Stein et al., "Exposing flaws of generative model
evaluation metrics and their unfair treatment of diffusion models", NeurIPS 2023, arXiv:2306.04675): class token of ViT-L/14
at 224, images resized by PIL in 8 bits. CMMD (Jayasumana et al., CVPR 2024, arXiv:2401.09603) takes CLIP image embeddings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.extractor import FeatureExtractor
from fastdiff.eval.preprocess import Preprocess, Size
from fastdiff.eval.weights import WeightFile, find_folder, state_digest

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}
_MIB = {"vits14": "85 MiB", "vitb14": "331 MiB", "vitl14": "1161 MiB", "vitg14": "4.3 GiB"}


class Normalised(nn.Module):
    """``network((levels / 255 - mean) / std)``, normalised to unit length where ``unit`` says so."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], *, unit: bool = False) -> None:
        super().__init__()
        self.network, self.unit = network, unit
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, levels: Tensor) -> Tensor:
        found = self.network((levels / 255 - self.mean) / self.std)
        return F.normalize(found, dim=1) if self.unit else found


def dinov2(
    arch: str = "vitl14",
    *,
    weights: str | Path | None = None,
    preprocess: str = "pil-bicubic",
    size: int = 224,
    allow_download: bool = False,
) -> FeatureExtractor:
    """The class token of DINOv2, as ``torch.hub``'s ``dinov2_<arch>`` gives it, on timm's network.

    Args:
        weights: ``dinov2_<arch>_pretrain.pth`` of Meta. It has no published SHA-256, so the weights' digest is in the name.

    timm resamples the position embedding with antialias and Meta does not; Meta's way is taken, as the published scores are.
    """
    if arch not in DINOV2:
        raise UserError(f"no DINOv2 {arch!r}: expected one of {', '.join(DINOV2)}.")
    timm = _library("timm")
    name = f"dinov2_{arch}_pretrain.pth"
    file = WeightFile(names=(name,), url=f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{arch}/{name}", size=_MIB[arch])
    path, _ = file.find(weights, allow_download=allow_download)
    network = timm.create_model(f"vit_{DINOV2[arch]}_patch14_dinov2", pretrained=False, img_size=size, num_classes=0)
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        state["pos_embed"] = resample_positions(state["pos_embed"], size // 14)
        network.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, network))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} holds no DINOv2 {arch}: {str(error)[:200]}") from error
    return FeatureExtractor(
        name=f"dinov2-{arch}" if size == 224 else f"dinov2-{arch}-{size}",
        network=Normalised(network, *IMAGENET),
        preprocess=Preprocess.parse(preprocess),
        dim=network.num_features,
        size=(size, size),
        digest=state_digest(network),
    )


def resample_positions(embedding: Tensor, side: int) -> Tensor:
    """DINOv2's position embedding [1, 1 + n^2, d] at ``side`` x ``side`` patches: bicubic at scale (side + 0.1) / n."""
    token, grid = embedding[:, :1], embedding[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return embedding
    grid = grid.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / n,) * 2, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class _Images(nn.Module):
    """The image tower of a CLIP or SigLIP model of open_clip or transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        found = model.encode_image(pixels) if hasattr(model, "encode_image") else model.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)


def open_clip_model(
    model: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    preprocess: str = "torch-bicubic",
    unit: bool = True,
    name: str = "",
) -> FeatureExtractor:
    """Image embeddings of any open_clip model.

    Args:
        model: a folder with ``open_clip_config.json``, a module, or an architecture such as ``"ViT-L-14"`` with ``weights``.
        weights: the file of an architecture's weights; nothing is downloaded.
        unit: normalise embeddings to unit length (CMMD); False for their raw values.
    """
    if isinstance(model, nn.Module):
        network, name = model, name or type(model).__name__
    elif (Path(model) / "open_clip_config.json").is_file():
        from fastdiff.eval.clip import load

        network, name = load(Path(model))[0], name or Path(model).name
    else:
        open_clip = _library("open_clip")
        names = (f"{model}.safetensors", f"{model}.pt", f"{model}.bin")
        file = WeightFile(names=names, url="https://huggingface.co/models?library=open_clip", size="size of the model")
        path, _ = file.find(weights)
        network, name = open_clip.create_model(str(model), pretrained=str(path)), name or str(model)
    visual: Any = network.visual
    side = visual.image_size
    return _tower(network, f"open_clip:{name}", (side, side) if isinstance(side, int) else tuple(side), preprocess, unit, visual)


def _tower(network: nn.Module, name: str, size: Size, preprocess: str, unit: bool, visual: Any) -> FeatureExtractor:
    tower = Normalised(_Images(network), visual.image_mean, visual.image_std, unit=unit)
    return _extractor(tower, network, name, size, preprocess, "pool" if unit else "raw")


def _extractor(normalised: nn.Module, network: nn.Module, name: str, size: Size, preprocess: str, layer: str) -> FeatureExtractor:
    """The extractor of ``normalised``; the digest is that of the ``network`` inside, whatever surrounds it."""
    return FeatureExtractor(
        name=name,
        network=normalised,
        preprocess=Preprocess.parse(preprocess),
        dim=_dim(normalised, size),
        size=size,
        layer=layer,
        digest=state_digest(network),
    )


def huggingface_clip(
    folder: str | Path, *, preprocess: str = "torch-bicubic", unit: bool = True, allow_download: bool = False
) -> FeatureExtractor:
    """Image embeddings of a CLIP or SigLIP folder of transformers, squashed to the model's size by ``preprocess``.

    Args:
        folder: a saved model with its ``preprocessor_config.json``, or a hub id, looked for in ``FASTDIFF_WEIGHTS`` and the cache.
    """
    path = _folder(folder, allow_download)
    transformers = _library("transformers")
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    if not hasattr(model, "get_image_features"):
        raise UserError(f"{path} holds a {type(model).__name__}, which has no image embedding: use hf_classifier for a classifier.")
    side, visual = model.config.vision_config.image_size, ImageStatistics(path)
    return _tower(model, f"hf:{path.name}", (side, side), preprocess, unit, visual)


def classifier(
    network: nn.Module,
    *,
    name: str,
    size: int | Size,
    mean: Sequence[float] = IMAGENET[0],
    std: Sequence[float] = IMAGENET[1],
    preprocess: str = "torch-bicubic",
    layer: str = "pool",
    head: str = "",
) -> FeatureExtractor:
    """The penultimate features of a classifier of timm, transformers or your own, or its ``layer="logits"``.

    Args:
        head: name of the module whose input the features are; the last linear layer by default.
    """
    shape = (size, size) if isinstance(size, int) else size
    normalised = Normalised(Penultimate(network, layer, head), mean, std)
    return _extractor(normalised, network, name, shape, preprocess, layer)


def hf_classifier(
    folder: str | Path, *, preprocess: str = "torch-bicubic", layer: str = "pool", head: str = "", allow_download: bool = False
) -> FeatureExtractor:
    """``classifier`` of an ``AutoModelForImageClassification`` folder with its ``preprocessor_config.json``."""
    path = _folder(folder, allow_download)
    network = _library("transformers").AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
    visual = ImageStatistics(path)
    options: dict[str, Any] = {"mean": visual.image_mean, "std": visual.image_std, "preprocess": preprocess, "layer": layer}
    return classifier(network, name=f"hf:{path.name}", size=visual.side(network.config), head=head, **options)


class Penultimate(nn.Module):
    """A classifier's features, caught where they enter its head, or its logits."""

    def __init__(self, network: nn.Module, layer: str = "pool", head: str = "") -> None:
        super().__init__()
        if layer not in ("pool", "logits"):
            raise UserError(f"no layer {layer!r} in a classifier: expected 'pool' (what enters the head) or 'logits'.")
        linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
        head = head or (linear[-1] if linear else "")
        modules = dict(network.named_modules())
        if head not in modules or not head:
            raise UserError(f"{type(network).__name__} has no module {head!r} for a head: pass head=... by its name.")
        self.network, self.layer, self.found = network, layer, torch.empty(0)
        modules[head].register_forward_pre_hook(self._catch)

    def _catch(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.found = inputs[0]

    def forward(self, pixels: Tensor) -> Tensor:
        self.found = torch.empty(0)
        out = self.network(pixels)
        if self.layer == "logits":
            return getattr(out, "logits", out)
        found, self.found = self.found, torch.empty(0)
        if len(found) != len(pixels):
            raise UserError(f"the head of {type(self.network).__name__} was not called once an image: pass head=... by its name.")
        return found.flatten(1)


class ImageStatistics:
    """Mean, standard deviation and size of a folder's ``preprocessor_config.json``."""

    def __init__(self, folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        if not file.is_file():
            raise UserError(
                f"{folder} has no preprocessor_config.json: without its mean and deviation every feature would be shifted."
            )
        self.config = json.loads(file.read_text())
        self.image_mean, self.image_std = self.config["image_mean"], self.config["image_std"]

    def side(self, config: Any) -> int:
        size = self.config.get("size", {})
        found = (
            size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or getattr(config, "image_size", 0)
        )
        if not found:
            raise UserError("preprocessor_config.json names no size: load the network and pass size=... to classifier(...).")
        return int(found)


@torch.inference_mode()
def _dim(network: nn.Module, size: Size) -> int:
    return network.eval()(torch.zeros(1, 3, *size)).shape[1]


def _folder(folder: str | Path, allow_download: bool) -> Path:
    if Path(folder).expanduser().is_dir():
        return Path(folder).expanduser()
    return find_folder(str(folder), allow_download=allow_download)


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"this extractor needs {name}: pip install {name.replace('_', '-')}.") from error
