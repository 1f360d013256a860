"""What an image costs: network calls, latency, throughput, memory, energy, size. All measured, none assumed.

A network call is one pass of one image through the denoiser. Calls are counted by a hook on the network itself, so
whatever the pipeline does inside (guidance, several steps, a scheduler of second order) is in the figure; a guided step
passes a batch of 2B through the network and counts two an image.

Energy is the GPU driver's own counter, read through ``pynvml`` (package ``nvidia-ml-py``). Where that module, a GPU or the
counter (before Volta) is missing, as on every CPU, there is no figure, and its column is None.
"""

import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIB, MB = 2**20, 10**6
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Calls:
    """What passed through a network: ``forwards`` calls of it with ``samples`` rows in all."""

    forwards: int = 0
    samples: int = 0

    def nfe(self, images: int) -> float:
        """Network calls an image when ``images`` came out."""
        return self.samples / images


def network_of(pipeline: Any) -> nn.Module:
    """The denoising network of a diffusers pipeline; ``ValueError`` when it has none under a known name."""
    for name in ("unet", "transformer"):
        if isinstance(network := getattr(pipeline, name, None), nn.Module):
            return network
    raise ValueError(f"a {type(pipeline).__name__} has no `unet` and no `transformer`: pass the network whose calls count.")


@contextmanager
def count_calls(network: nn.Module) -> Iterator[Calls]:
    """Count the forwards of ``network`` and their batch sizes inside the block.

    >>> with count_calls(pipeline.unet) as calls:
    ...     images = pipeline(prompts, num_inference_steps=25, guidance_scale=3.0).images
    >>> calls.nfe(len(images))                               # 50.0
    """
    calls = Calls()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.forwards += 1
        calls.samples += next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim)

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of one call, in milliseconds; quantiles by linear interpolation."""

    p50_ms: float
    p95_ms: float
    repeats: int


def latency(call: Callable[[], object], *, warmup: int = 2, repeats: int = 20, device: str | torch.device = "cpu") -> Latency:
    """Time ``repeats`` calls after ``warmup`` untimed ones; on a GPU each time ends when the device is done."""
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: a latency needs at least one timed call.")
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = torch.tensor(times[warmup:], dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return Latency(p50, p95, repeats)


@dataclass
class Memory:
    """``peak_mib``: the largest amount held inside the block, set when it ends."""

    peak_mib: float = float("nan")


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[Memory]:
    """Peak memory inside the block in MiB.

    On a GPU: what torch allocated on ``device``, weights of all loaded models included. On a CPU: the resident set of
    the whole process, Python and libraries included; Linux can reset that peak, elsewhere it is the peak since the
    process began.
    """
    memory, on_gpu = Memory(), torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    resettable = not on_gpu and _reset_resident_peak()
    try:
        yield memory
    finally:
        if on_gpu:
            memory.peak_mib = torch.cuda.max_memory_allocated(device) / MIB
        else:
            memory.peak_mib = _resident_peak_mib() if resettable else _lifetime_peak_mib()


@dataclass
class Energy:
    """``joules``: what the whole board used inside the block, idle power and other programs included; None if unknown."""

    joules: float | None = None


@contextmanager
def energy(device: str | torch.device = "cpu", *, meter: Callable[[], float] | None = None) -> Iterator[Energy]:
    """The energy used inside the block in joules, or None where no meter is.

    Args:
        meter: a running total in joules; None takes the driver's of ``device``. It steps about every 0.1 s: measure seconds.
    """
    used, read = Energy(), meter or _board_meter(torch.device(device))
    before = None if read is None else read()
    yield used
    if read is not None and before is not None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        used.joules = read() - before


def _board_meter(device: torch.device) -> Callable[[], float] | None:
    """NVML's running total of a CUDA device in joules; None without a GPU, pynvml or the counter."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # CUDA's numbers are not NVML's
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None

    def read() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    return read


def parameters_m(*networks: nn.Module) -> float:
    """Millions of parameters of all ``networks``, a shared one counted once. Quantised weights count as they are stored."""
    return sum({id(p): p.numel() for network in networks for p in network.parameters()}.values()) / 1e6


def size_mb(*paths: Path) -> float:
    """Size on disk in 10^6 bytes of files and of all files below folders, links followed and no file counted twice."""
    files = {file.resolve() for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    return sum(file.stat().st_size for file in files) / MB


def _reset_resident_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak_mib() -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _lifetime_peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
