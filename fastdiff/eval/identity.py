"""A hash of what a pipeline makes of a prompt and a noise, wherever its folder lies and whatever it is called."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

_OF_THE_WRITER = ("transformers_version", "architectures", "dtype", "torch_dtype")  # written on saving; dtypes are the weights'


def pipeline_identity(pipeline: Any) -> str:
    """SHA-256 of a diffusers pipeline: its class, all weights and buffers in their dtypes, adapters with their scales and the
    configs of networks and scheduler, and the tokenizers' vocabularies.

    It reads every weight once, about a second a gigabyte. The device, the library versions and the options of a call do not
    enter.
    """
    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, part in sorted(pipeline.components.items()):
        digest.update(f"\n{name} {type(part).__name__} {_config(part)}".encode())
        if isinstance(part, nn.Module):
            _weights(digest, part)
        elif hasattr(part, "get_vocab"):
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()


def _config(part: Any) -> str:
    config: Any = getattr(part, "config", {})
    values = dict(config) if hasattr(config, "keys") else config.to_dict()
    public = {k: v for k, v in values.items() if not k.startswith("_") and k not in _OF_THE_WRITER}
    return json.dumps(public, sort_keys=True, default=str)


def _weights(digest: Any, network: nn.Module) -> None:
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for key, module in network.named_modules():
        if isinstance(scales := getattr(module, "scaling", None), dict):  # peft: outside the state dict
            active = sorted(getattr(module, "active_adapters", []))
            digest.update(f"{key} {sorted(scales.items())} {active} {getattr(module, 'disable_adapters', False)}".encode())
