"""The networks of a diffusers folder without their weights: built on the meta device from config files alone.

A network of ten billion parameters takes no memory there and still knows its shapes, which is all a plan needs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def blank_networks(source: str, *, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Every network that ``model_index.json`` names, by the name of its component; of a hub id only small files are fetched.

    Networks of other libraries than diffusers and transformers are left to the pipeline's own loading.
    """
    from diffusers import DiffusionPipeline

    networks = {}
    for name, entry in DiffusionPipeline.load_config(source).items():
        kind = _class(*entry) if isinstance(entry, list | tuple) and len(entry) == 2 else None
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            networks[name] = _blank(kind, source, name, dtype)
    return networks


def _class(library: Any, name: Any) -> Any:
    import diffusers
    import transformers

    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, str(library), None)
    return getattr(home, str(name), None)


def _blank(kind: Any, source: str, name: str, dtype: torch.dtype | None) -> nn.Module:
    if hasattr(kind, "from_config"):  # diffusers loads in float32, whatever is stored
        config = kind.load_config(source, subfolder=name)
        with torch.device("meta"):
            network: nn.Module = kind.from_config(config)
        return _in(network, dtype or torch.float32)
    config = kind.config_class.from_pretrained(source, subfolder=name)
    with torch.device("meta"):
        network = kind(config)
    return _in(network, dtype or config.dtype or _stored_dtype(Path(source, name)) or torch.float32)  # as transformers decides


def _in(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    return network if next(network.parameters()).dtype == dtype else network.to(dtype)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The first floating dtype in the headers of a folder's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                if (found := _DTYPES.get(file.get_slice(key).get_dtype())) is not None:
                    return found
    return None
