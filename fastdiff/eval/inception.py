"""The Inception network of 2015-12-05, whose pooled features are the space of FID.

It differs from torchvision's ``inception_v3`` in its weights, in 1008 classes, in average pools that do not count their
padding, and in a max pool in the last block, as the TensorFlow graph has them. Parameter names are torchvision's, so that the
files of pytorch-fid and torch-fidelity (the same bytes) load as they are.

Layers: ``pool`` [2048], for FID and KID; ``logits`` [1008]; ``logits_unbiased``, without the bias, for the Inception score as
OpenAI's evaluator and torch-fidelity have it; ``mixed_6`` [2023], for sFID (``spatial`` says where it is).
(Szegedy et al., "Rethinking the Inception architecture", CVPR 2016, arXiv:1512.00567.)
"""

from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile, is_zipfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.eval.extractor import INCEPTION, FeatureExtractor
from fastdiff.eval.preprocess import Preprocess
from fastdiff.eval.spatial import spatial_features
from fastdiff.eval.weights import WeightFile, state_digest

Pool = Literal["average", "max", "shrink"]
Shape = tuple[int, int | tuple[int, int]]  # output channels and kernel; -3 is 3x3 with stride 2 and no padding
DIMS = {"pool": 2048, "logits": 1008, "logits_unbiased": 1008, "mixed_6": 2023}
WEIGHTS = WeightFile(
    names=(
        "pt_inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
        "inception-2015-12-05.pt",
    ),
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    size="91 MiB",
    sha256=(
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",  # pytorch-fid and torch-fidelity
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",  # TorchScript of StyleGAN2-ADA and clean-fid
    ),
)


class _Conv(nn.Module):
    def __init__(self, width_in: int, width: int, kernel: int | tuple[int, int], *, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if pad else 0
        self.conv = nn.Conv2d(width_in, width, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Chains of convolutions side by side and a pooled branch; a chain may end in a fork of two."""

    def __init__(self, width_in: int, branches: dict[str, list[Shape | tuple[Shape, Shape]]], pool: Pool, pooled: int = 0) -> None:
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.pool = pool
        for branch, stages in branches.items():
            width, chain = width_in, []
            for i, stage in enumerate(stages, 1):
                fork: Any = stage if isinstance(stage[0], tuple) else (stage,)
                names = [f"{branch}_{i}{'ab'[k]}" if len(fork) == 2 else f"{branch}_{i}" for k in range(len(fork))]
                names = [branch] if len(stages) == 1 else names
                for name, (out, kernel) in zip(names, fork, strict=True):
                    shrinks = kernel == -3
                    self.add_module(name, _Conv(width, out, 3 if shrinks else kernel, stride=1 + shrinks, pad=not shrinks))
                chain.append(names)
                width = fork[0][0]
            self.chains.append(chain)
        if pooled:
            self.branch_pool = _Conv(width_in, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], dim=1) if len(names) > 1 else getattr(self, names[0])(y)
            found.append(y)
        if self.pool == "shrink":
            return torch.cat([*found, F.max_pool2d(x, 3, stride=2)], dim=1)
        # TF's average does not count the padding; its last block takes the maximum, which no other Inception does
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*found, self.branch_pool(pooled)], dim=1)


def _a(width: int, pooled: int) -> _Mixed:
    chains: Any = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return _Mixed(width, chains, "average", pooled)


def _c(width: int, narrow: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    double: list[Shape] = [(narrow, 1), (narrow, column), (narrow, row), (narrow, column), (192, row)]
    chains: Any = {"branch1x1": [(192, 1)], "branch7x7": [(narrow, 1), (narrow, row), (192, column)], "branch7x7dbl": double}
    return _Mixed(width, chains, "average", 192)


def _e(width: int, pool: Pool) -> _Mixed:
    fork = ((384, (1, 3)), (384, (3, 1)))
    chains: Any = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]}
    return _Mixed(width, chains, pool, 192)


class Inception(nn.Module):
    """Images [B, 3, 299, 299], about in [-1, 1], to the features of ``layer``."""

    def __init__(self, layer: str = "pool") -> None:
        super().__init__()
        self.layer = layer
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _Mixed(288, {"branch3x3": [(384, -3)], "branch3x3dbl": [(64, 1), (96, 3), (96, -3)]}, "shrink")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(768, 128), _c(768, 160), _c(768, 160), _c(768, 192)
        corner: list[Any] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, -3)]
        self.Mixed_7a = _Mixed(768, {"branch3x3": [(192, 1), (320, -3)], "branch7x7x3": corner}, "shrink")
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        if self.layer == "mixed_6":
            return spatial_features(self.Mixed_6d.get_submodule("branch1x1")(x))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        if self.layer == "pool":
            return pool
        return F.linear(pool, self.fc.weight, self.fc.bias if self.layer == "logits" else None)


class _Levels(nn.Module):
    """The range the graph expects: (x - 128) / 128 in TensorFlow and clean-fid, 2 x / 255 - 1 in pytorch-fid."""

    def __init__(self, network: nn.Module, *, symmetric: bool) -> None:
        super().__init__()
        self.network, self.symmetric = network, symmetric

    def forward(self, levels: Tensor) -> Tensor:
        return self.network(2 * (levels / 255) - 1 if self.symmetric else (levels - 128) / 128).flatten(1)


def inception(
    weights: str | Path | None = None,
    *,
    preprocess: str = "clean",
    layer: str = "pool",
    allow_download: bool = False,
    verify: bool = True,
) -> FeatureExtractor:
    """The extractor of FID, KID, the Inception score and sFID.

    Args:
        weights: the file of pytorch-fid or torch-fidelity, or a TorchScript of the network (clean-fid's, or your own whose
            input is [B, 3, 299, 299]); None looks where ``WeightFile.find`` says.
        layer: see the module; a TorchScript gives ``pool`` only.
        verify: False takes weights of another SHA-256; their score is ``FD[inception-2015#...]`` and never FID.
    """
    if layer not in DIMS:
        raise UserError(f"no layer {layer!r} in {INCEPTION}: expected one of {', '.join(DIMS)}.")
    file, published = WEIGHTS.find(weights, allow_download=allow_download, verify=verify)
    network = _script(file, layer) if _is_script(file) else _module(file, layer)
    return FeatureExtractor(
        name=INCEPTION,
        network=_Levels(network, symmetric=preprocess.startswith("pytorch-fid")),
        preprocess=Preprocess.parse(preprocess),
        dim=DIMS[layer],
        size=(299, 299),
        layer=layer,
        published=published,
        digest=state_digest(network),
    )


def has_logits(extractor: FeatureExtractor) -> bool:
    """Whether the pooled features of ``extractor`` become logits by a last layer that is at hand."""
    network = getattr(extractor.network, "network", None)
    return extractor.name == INCEPTION and extractor.layer == "pool" and isinstance(network, Inception)


def logits_of(extractor: FeatureExtractor, pooled: Tensor) -> Tensor:
    """Logits [N, 1008] without the bias of ``pooled`` features [N, 2048]: the layer ``logits_unbiased`` without another pass.

    ``UserError`` where ``has_logits`` says that there are none.
    """
    if not has_logits(extractor):
        raise UserError(
            f"the Inception score needs the classes of {INCEPTION}, and {extractor.id} has no last layer at hand (a TorchScript "
            f"gives the pool layer only): take the weights {WEIGHTS.names[0]}, or leave the score out."
        )
    network: Any = extractor.network
    return F.linear(pooled, network.network.fc.weight.to(pooled))


def _module(file: Path, layer: str) -> nn.Module:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    network = Inception(layer)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{file} is no Inception of 2015: {first[:200]} Torchvision's own weights give another FID.") from error
    return network


def _is_script(file: Path) -> bool:
    return is_zipfile(file) and any("/code/" in name for name in ZipFile(file).namelist())


def _script(file: Path, layer: str) -> nn.Module:
    if layer != "pool":
        raise UserError(f"{file} is a TorchScript, which gives the pool layer only: take {WEIGHTS.names[0]} for {layer}.")
    network = torch.jit.load(str(file), map_location="cpu")
    return getattr(network, "layers", network)  # clean-fid's resizes and scales around .layers, which is done here
