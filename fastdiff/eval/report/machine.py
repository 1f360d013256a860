"""What a measurement depends on besides the code."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = ("fastdiff", "torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft")


def environment() -> dict[str, str]:
    """Versions, system, processor cores, threads and GPU."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):  # a library that is not installed has no version to report
            facts[name] = version(name)
    facts |= {"cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
