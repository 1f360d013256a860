"""``Teacher``: the frozen denoiser, its conditioner, its codec, and the pipeline they came from.

>>> teacher = Teacher.from_pretrained("fashion")                  # bundled; or a diffusers folder, or a hub id
>>> cond, null = teacher.encode(["a red boot on a white background"]), teacher.encode([""])
>>> teacher.denoiser.guided(x_t, t, cond, null, 3.0).x0

>>> Teacher.from_module(network, DiscreteVP(table), "v_prediction", shape=(1, 8, 8), prompts=["0", "1"])      # your own network
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import LEVELS, DiscreteVP, NoiseProcess
from fastdiff.errors import UserError
from fastdiff.models.blank import blank_networks
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.families import family_of
from fastdiff.models.families.base import Family
from fastdiff.models.families.module import Module
from fastdiff.models.law import Law, LawDenoiser

BUNDLED = {name: Path(__file__).parent.parent / "assets" / name for name in ("fashion", "fashion-flow")}


class Teacher:
    """A frozen teacher: a diffusers pipeline, or whatever a ``Family`` describes. It refuses, with the reason, what has none.

    Attributes:
        family: how it is called; ``family.pipeline`` is the diffusers pipeline or None.
        denoiser: the frozen denoiser. ``law`` is the closed form that answers in place of the network, or None.
        prompts: the prompts it brings along, or None.
    """

    def __init__(
        self,
        source: Any,
        *,
        name: str = "teacher",
        prompts: Sequence[str] | None = None,
        law: Law | None = None,
        size: Mapping[str, int] | None = None,
    ) -> None:
        self.family: Family = source if isinstance(source, Family) else family_of(source)
        self._resize(name, size or {})
        self.pipeline, self.name, self.law = self.family.pipeline, name, law
        self.prompts = None if prompts is None else list(prompts)
        for part in self.family.networks():
            part.eval().requires_grad_(False)
        try:
            self.process, self.prediction_type = self.family.process()
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        if self.prediction_type == "epsilon" and self.process.alpha(self.process.at_level(torch.tensor(LEVELS - 1))) < 1e-12:
            raise UserError(
                f"{name} predicts epsilon and its last time has no signal (zero-terminal SNR): x0 = (x - s eps) / 0 there. "
                "Such a scheduler belongs to a v-prediction teacher; set rescale_betas_zero_snr to false or prediction_type right."
            )
        if law is not None:
            self._check(law)
        self._null: tuple[Any, Any] = (None, None)
        network = self.family.network(self.family.backbone)
        self.denoiser = LawDenoiser(law) if law is not None else Denoiser(network, self.process, self.prediction_type)

    def _resize(self, name: str, size: Mapping[str, int]) -> None:
        known = self.family.sizes
        if unknown := [key for key in size if key not in known]:
            own = f"takes {', '.join(known)}" if known else "has the size of its network"
            raise UserError(
                f"{name} {own}, and not {', '.join(unknown)}: a sample would have had another shape than was asked for."
            )
        if size:
            self.family.size = dict(size)

    def _check(self, law: Law) -> None:
        ends = torch.tensor([self.process.t_min, self.process.t_max])
        ends = ends.long() if isinstance(self.process, DiscreteVP) else ends
        same = type(law.process) is type(self.process) and law.process.t_max == self.process.t_max
        if not same or not torch.equal(law.process.sigma(ends), self.process.sigma(ends)):
            raise UserError(
                f"the law of {self.name} is under another process than the teacher: times would mean different noise. "
                "Pass law.under(process)."
            )
        shape = getattr(law, "shape", self.latent_shape)
        if tuple(shape) != self.latent_shape:
            raise UserError(f"the law of {self.name} has samples of shape {tuple(shape)}, the teacher {self.latent_shape}.")

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        process: NoiseProcess,
        prediction_type: str,
        *,
        shape: Sequence[int],
        prompts: Sequence[str] = ("",),
        name: str = "module",
        law: Law | None = None,
        **options: Any,
    ) -> "Teacher":
        """A network of your own, called ``module(x_t, network_time, cond)``.

        Args:
            module: puts out a tensor like x_t [B, *shape]; it is frozen and put into eval mode as it stands.
            process: what x_t is made by; ``network_time`` is its ``process.network_time(t)``.
            prediction_type: one of ``fastdiff.diffusion.prediction.PREDICTION_TYPES``.
            shape: of one sample.
            prompts: what to train on; class labels as text unless ``encode`` is given.
            law: a closed form that answers for the teacher; ``module`` then only starts the students. Same process and shape.
            options: ``encode`` (prompts to a condition), ``decode`` (samples to images), ``lora_targets`` (all linear layers),
                ``call(module, x_t, network_time, cond)``, ``time_embedding`` (the name of the layer that puts out the embedded time
                [B, D], and D: where a method that has cameras adds theirs), ``bottleneck`` (the name of a layer that puts out
                features [B, width], and width: what a discriminator looks at), ``blocks`` (several such, in the order in which they
                run, for one of many levels; else it has the bottleneck alone).
        """
        return cls(Module(module, process, prediction_type, shape, **options), name=name, prompts=prompts, law=law)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        size: Mapping[str, int] | None = None,
    ) -> "Teacher":
        """Load a bundled teacher by name, a diffusers folder, or a hub id.

        Args:
            size: height, width and num_frames of a sample, where the network knows no size of its own (FLUX, videos); without it
                those of the pipeline's call.

        Raises:
            UserError: the folder does not exist, is no pipeline, or holds damaged weights; or the family takes no such size.
        """
        return cls(load_pipeline(name, dtype=dtype).to(device), name=_short(name), size=size)

    @classmethod
    def planned(cls, name: str | Path, *, dtype: torch.dtype | None = None, size: Mapping[str, int] | None = None) -> "Teacher":
        """The teacher without its weights: networks on the meta device, built from configs, with the real scheduler and tokenizer.

        It knows shapes, dtypes and times; what reads weights (``identity``, pictures) does not work on it.
        """
        return cls(load_pipeline(name, dtype=dtype, blank=True), name=_short(name), size=size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the process, such as (C, h, w)."""
        return self.family.latent_shape

    @property
    def device(self) -> torch.device:
        return next(self.family.backbone.parameters()).device

    def encode(self, prompts: list[str]) -> Any:
        """The condition of a batch of prompts."""
        return self.family.encode(prompts)

    @property
    def null(self) -> Any:
        """The condition of the empty prompt, batch 1; remembered until the pipeline moves."""
        first = next(self.family.backbone.parameters())
        if self._null[0] != (first.device, first.dtype):
            self._null = ((first.device, first.dtype), self.encode([""]))
        return self._null[1]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W] in [0, 1], without gradient (``family.decode`` has one)."""
        return self.family.decode(latents)

    def weights_hash(self) -> str:
        """SHA-256 of the backbone's own weights, the same with and without adapters on it."""
        return _hash(self.family.backbone)

    def identity(self) -> str:
        """SHA-256 of everything that decides what the teacher makes of a latent and a prompt: all networks, the schedule, the
        prediction type."""
        networks = self.family.networks()
        if isinstance(self.process, DiscreteVP):
            times = torch.arange(int(self.process.t_max) + 1)
        else:
            times = torch.linspace(self.process.t_min, self.process.t_max, 1001, dtype=torch.float64)
        path = zip(self.process.alpha(times).tolist(), self.process.sigma(times).tolist(), strict=True)
        schedule = ",".join(f"{a:.9g} {s:.9g}" for a, s in path)
        parts = [
            *map(_hash, networks),
            self.prediction_type,
            schedule,
            *(f"{key}={value}" for key, value in self.family.size.items()),
        ]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        if ".lora_" not in key:
            digest.update(key.replace(".base_layer", "").encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(name: str | Path) -> str:
    short = Path(name).name
    local = short in BUNDLED and str(name) not in BUNDLED
    return f"{short}-local" if local else short  # a folder of that name has no captions of its own


def _own_code(folder: Path) -> dict[str, Any]:
    """Consent to the pipeline file of a folder, if it is to the byte one of this library's."""
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError):
        return {}  # a hub id, or an index that diffusers itself will not read
    if not isinstance(kind, list):
        return {}
    file = f"{Path(kind[0]).name}.py"
    own, theirs = Path(__file__).parent.parent / "pipelines" / file, folder / file
    if not own.is_file() or not theirs.is_file() or own.read_bytes() != theirs.read_bytes():
        raise UserError(
            f"{folder} runs code of its own ({file}), which is not what this version of fastdiff writes: it could do anything. If "
            "you trust it, load it yourself with DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)."
        )
    return {"trust_remote_code": True}


def load_pipeline(name: str | Path, *, dtype: torch.dtype | None = None, blank: bool = False) -> Any:
    """A diffusers pipeline by bundled name, folder or hub id; safetensors only, progress bar off. ``blank`` leaves out all weights.

    Raises:
        UserError: with one line that says what is wrong with the name or the folder, and what to do.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    folder = BUNDLED.get(str(name), Path(name))
    looks_local = folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{name} is no diffusers pipeline: it has no model_index.json. Pass the folder that save_pretrained wrote.")
    if not folder.exists() and looks_local:
        raise UserError(
            f"no folder {name} and no bundled teacher of that name. Bundled: {', '.join(BUNDLED)}; or pass a hub id owner/name."
        )
    options: dict[str, Any] = _own_code(folder) | ({} if dtype is None else {"torch_dtype": dtype})
    try:
        options |= blank_networks(str(folder), dtype=dtype) if blank else {}
        pipeline = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **options)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:300].rsplit(' ', 1)[0]} ..."
        if not folder.exists():
            raise UserError(f"there is no folder {name} here, and as a hub id it could not be fetched: {reason}") from error
        what = "Check that the folder is complete, or save it again."
        raise UserError(f"cannot load the pipeline {name}: {reason} {what}") from error
    networks = [(key, part) for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    holes = [f"{key}.{parameter}" for key, part in networks for parameter, value in part.named_parameters() if value.is_meta]
    if holes and not blank:
        raise UserError(f"the pipeline {name} lacks weights: {', '.join(holes[:3])} and {len(holes)} in all. Save it again, whole.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
