"""``Scenes``: n particles of one kind as one module, whose tensors are stacked along the first dimension."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.models.scenes.camera import Camera


class Scenes(nn.Module, ABC):
    """``scenes(index [B], camera) -> x`` [B, *shape], differentiable in everything that is a parameter.

    Args:
        n: number of particles.
        shape: of what a particle shows.
        seed: of the particles' starting values.
        texture_only: the geometry is kept in buffers: it is saved and loaded, and no gradient reaches it.
    """

    kind: ClassVar[str]
    """The name of this kind in commands and files."""
    geometry: ClassVar[tuple[str, ...]] = ()
    """The tensors that say where something is; the others say how it looks."""

    def __init__(self, n: int, shape: tuple[int, ...], *, seed: int = 0, texture_only: bool = False) -> None:
        super().__init__()
        if texture_only and not self.geometry:
            raise UserError(f"{self.kind} have no geometry: there is no texture stage. Train them in full.")
        if self.geometry and len(shape) != 3:
            raise UserError(
                f"{self.kind} show pictures [C, H, W], and the teacher's samples have the shape {tuple(shape)}: use images."
            )
        self.n, self.shape = n, tuple(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, value in self.start(generator).items():
            if texture_only and name in self.geometry:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    @abstractmethod
    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The starting values of all tensors [n, ...]."""

    def options(self) -> dict[str, int]:
        """What this kind is built with beside the arguments of all."""
        return {}

    @abstractmethod
    def forward(self, index: Tensor, camera: Camera) -> Tensor:
        """What particle ``index[b]`` shows to camera b."""

    def opacity(self, index: Tensor, camera: Camera) -> Tensor:
        """``1 - T`` [B, H, W]: the share of light from behind that each pixel's ray loses."""
        raise NotImplementedError(f"{self.kind} are not looked through: they have no opacity.")


def turntable(scenes: Scenes, *, frames: int = 24, elevation: float = 0.0) -> Tensor:
    """All particles [frames n, *shape] from ``frames`` azimuths in a circle; all of one azimuth stand together."""
    device = next(scenes.parameters()).device
    ring = Camera.turntable(frames, elevation=elevation, device=device)
    every = torch.arange(scenes.n, device=device)
    return torch.cat(
        [scenes(every, Camera(ring.azimuth[k].expand(scenes.n), ring.elevation[k].expand(scenes.n))) for k in range(frames)]
    )


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal on the CPU, whatever the default device is (a plan's has no values)."""
    return torch.randn(*shape, generator=generator, device="cpu")


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: renderers multiply matrices, and in bf16 an optical depth would be off by a hundredth. A plan has none."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def save_scenes(scenes: Scenes, folder: Path, note: Mapping[str, Any]) -> None:
    """Write ``scenes.safetensors``, and ``note`` with the kind and shape of the scenes to ``fastdiff.json``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from fastdiff.files import aside

    built = {"kind": scenes.kind, "particles": scenes.n, "shape": list(scenes.shape), "options": scenes.options()}
    try:
        with aside(folder / "scenes.safetensors") as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in scenes.state_dict().items()}, part)
        with aside(folder / "fastdiff.json") as part:
            part.write_text(json.dumps({**note, "scenes": built}, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the scenes to {folder}: {error}. Free space or choose another --output; the checkpoint is kept."
        ) from error


def load_scenes(folder: Path, *, texture_only: bool = False) -> Scenes:
    """The scenes that ``save_scenes`` wrote into ``folder``.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fastdiff.models.scenes import SCENES

    try:
        record = json.loads((folder / "fastdiff.json").read_text(encoding="utf-8"))["scenes"]
        scenes = SCENES[record["kind"]](record["particles"], tuple(record["shape"]), texture_only=texture_only, **record["options"])
        scenes.load_state_dict(load_file(folder / "scenes.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"no scenes can be read from {folder}: {error}. Pass the output folder of a finished run.") from error
    return scenes
