"""Where the weights of a feature network are: an explicit path, ``FASTDIFF_WEIGHTS``, the library's cache, a download.

Nothing is downloaded unless ``allow_download=True`` is passed, and nothing that has a published SHA-256 is loaded with
another one: a truncated or replaced file would give features that look like features.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.errors import UserError
from fastdiff.files import aside

FOLDER = "FASTDIFF_WEIGHTS"
TOKENIZER_FILES = ("*.json", "*.txt")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published file: the names it goes by, where it comes from, its size and its SHA-256 (empty where none is published)."""

    names: tuple[str, ...]
    url: str
    size: str
    sha256: tuple[str, ...] = ()
    repo: str = ""
    """The Hugging Face repository that holds it, whose cache is looked into before torch's."""

    def find(self, path: str | Path | None = None, *, allow_download: bool = False, verify: bool = True) -> tuple[Path, bool]:
        """The file, and whether it is the published one.

        Args:
            path: looked at first and alone; a folder is searched for ``names``.
            allow_download: fetch it into torch's cache when it is nowhere.
            verify: False takes any file at ``path``; its features are then nobody else's.

        Raises:
            UserError: it is nowhere, or its SHA-256 is another than the published.
        """
        looked = []
        for candidate in self._candidates(path):
            looked.append(candidate)
            if candidate.is_file():
                return candidate, self._published(candidate, required=verify or path is None)
        if path is None and allow_download:
            return self._download(), bool(self.sha256)
        digest = f", SHA-256 {self.sha256[0]}" if self.sha256 else ""
        raise _missing(f"{self.names[0]} ({self.size}{digest})", looked, self.url, "PATH")

    def _candidates(self, path: str | Path | None) -> Iterator[Path]:
        if path is not None:
            given = Path(path).expanduser()
            yield from (given / name for name in self.names) if given.is_dir() else (given,)
            return
        if folder := os.environ.get(FOLDER):
            yield from (Path(folder).expanduser() / name for name in self.names)
        if self.repo:
            yield from _hub_cache(self.repo, self.names)
        yield from (_torch_cache() / name for name in self.names)

    def _published(self, file: Path, *, required: bool) -> bool:
        if not self.sha256:
            return False
        found = sha256(file)
        if found not in self.sha256 and required:
            raise UserError(
                f"{file} has SHA-256 {found}, but the published file has {' or '.join(self.sha256)}: it is truncated or another "
                "network. Fetch it again, or pass verify=False to use it under its own name.",
                command=f"{file} has SHA-256 {found}, but the published file has {' or '.join(self.sha256)}: it is truncated or "
                "another network. Fetch it again, or give the published file with --weights.",
            )
        return found in self.sha256

    def _download(self) -> Path:
        import torch

        target = _torch_cache() / self.names[0]
        with aside(target) as part:
            torch.hub.download_url_to_file(self.url, str(part))
            self._published(part, required=True)
        return target


def _missing(what: str, looked: Sequence[Path], url: str, kind: str) -> UserError:
    """The error about weights that are nowhere, in words of Python and of the command line."""
    said = f"{what} is needed and not there. Looked for: {', '.join(map(str, looked))}. Get it from {url} and"
    folder = f"put it into the folder that {FOLDER} names"
    return UserError(
        f"{said} pass weights={kind} or {folder}; allow_download=True fetches it.",
        command=f"{said} give --weights {kind}, or {folder}.",
    )


def find_folder(
    name: str, path: str | Path | None = None, *, allow_download: bool = False, only: Sequence[str] | None = None
) -> Path:
    """The folder of a Hugging Face model: ``path``, ``FASTDIFF_WEIGHTS``/``name``, the hub's cache, a download.

    Args:
        only: patterns of the files to download, such as ``MODEL_FILES``, as many repositories hold one model in several formats.

    ``UserError`` when it is nowhere.
    """
    looked = [Path(path).expanduser()] if path is not None else [Path(name).expanduser()]
    if path is None and (folder := os.environ.get(FOLDER)):
        looked += [Path(folder) / name, Path(folder) / name.split("/")[-1]]
    for candidate in looked:
        if candidate.is_dir():
            return candidate
    if path is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(name, local_files_only=not allow_download, allow_patterns=None if only is None else list(only))
            )
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
            looked.append(Path("the Hugging Face cache"))
    raise _missing(f"the model folder {name!r}", looked, f"https://huggingface.co/{name}", "FOLDER")


def load_state(file: str | Path) -> dict[str, Any]:
    """What a safetensors file or a ``torch.save`` of tensors holds, on the CPU; ``UserError`` for a pickle of anything else."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} holds no plain tensors: {reason} It is damaged or holds code; fetch it again.") from error


def sha256(file: str | Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def state_digest(network: nn.Module) -> str:
    """First eight hex digits of the SHA-256 of a network's weights, whatever file they came from.

    Batch norm's count of batches is left out: it moves no feature, and some files have it.
    """
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def _hub_cache(repo: str, names: tuple[str, ...]) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        if isinstance(found := try_to_load_from_cache(repo, name), str):
            yield Path(found)


def _torch_cache() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"
