"""VBench: sixteen dimensions of generated videos.

    <folder>/<prompt>-0.mp4   to -4.mp4, five videos a prompt, and nothing else in the folder

(Huang et al., "VBench: comprehensive benchmark suite for video generative models", CVPR 2024, arXiv:2311.17982.) Layout read in
``prompts/README.md`` (names, five videos, 8 frames a second) and ``vbench/__init__.py`` (``prompt_en`` and ``dimension`` of
``VBench_full_info.json``; names matched exactly; the first file's suffix is taken for all) of ``Vchitect/VBench``. Recalled, not
read: that ``temporal_flickering`` is published with 25 videos a prompt, of which their static filter keeps the still ones.
"""

import json
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.images import to_uint8
from fastdiff.errors import UserError
from fastdiff.eval.exporters.plan import Piece, Plan, digest, file_name, read_text
from fastdiff.eval.subject import Subject


def vbench(source: str | Path, *, dimensions: Sequence[str] = (), per_prompt: int = 5, fps: int = 8) -> Plan:
    """The plan of ``VBench_full_info.json``; the subject must draw videos, such as that of ``video_subject``.

    Args:
        dimensions: draw only the prompts of these; all by default.
        per_prompt: 5; the scorer reads no more, their static filter does.

    Raises:
        UserError: imageio-ffmpeg is not installed, the file is another, or no prompt has these dimensions.
    """
    _ffmpeg()  # before hours of drawing
    text = read_text(source, "VBench's VBench_full_info.json")
    try:
        entries = [(entry["prompt_en"], set(entry["dimension"])) for entry in json.loads(text)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{source} is no VBench_full_info.json, a list of objects with prompt_en and dimension.") from error
    known = {name for _, names in entries for name in names}
    if unknown := set(dimensions) - known:
        raise UserError(f"no prompt of {source} has the dimension {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}.")
    wanted = dict.fromkeys(prompt for prompt, names in entries if not dimensions or names & set(dimensions))
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in entries))}
    pieces = [
        Piece(file_name(prompt, f"-{k}.mp4", benchmark="VBench"), prompt, (numbers[prompt] * per_prompt + k,))
        for prompt in wanted
        for k in range(per_prompt)
    ]
    save = partial(save_mp4, fps=fps)
    return Plan(benchmark="VBench", source_sha256=digest(text), per_prompt=per_prompt, pieces=pieces, save=save, video=True)


def save_mp4(videos: Tensor, path: Path, *, fps: int = 8) -> None:
    """The one video of ``videos`` [1, F, 3, H, W] in [0, 1] as H.264; ``UserError`` when a side is odd."""
    frames = to_uint8(videos[0]).permute(0, 2, 3, 1).contiguous()
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"frames are {height}x{width}: H.264 halves the colours' resolution, so both sides must be even.")
    writer = _ffmpeg().write_frames(str(path), (width, height), fps=fps, macro_block_size=1, quality=8)
    writer.send(None)
    for frame in frames:
        writer.send(frame.numpy().tobytes())
    writer.close()


def video_subject(name: str, pipeline: Any, **options: Any) -> Subject:
    """A diffusers text-to-video pipeline as a subject that draws [B, F, 3, H, W].

    Args:
        options: passed on to the pipeline, such as ``num_frames``, ``height``, ``num_inference_steps`` and ``guidance_scale``;
            without any it is called bare.

    ``UserError`` when the pipeline draws images.
    """

    def generate(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        drawn = pipeline(prompts, generator=generators, output_type="pt", **options)
        if not hasattr(drawn, "frames"):
            raise UserError(f"{type(pipeline).__name__} draws images, and VBench scores motion: pass a text-to-video pipeline.")
        return drawn.frames.float().cpu()

    pipeline.set_progress_bar_config(disable=True)
    steps, guidance = options.get("num_inference_steps"), options.get("guidance_scale")
    return Subject(name=name, generate=generate, steps=steps, guidance_scale=guidance, device=pipeline.device)


def _ffmpeg() -> Any:
    try:
        return import_module("imageio_ffmpeg")
    except ModuleNotFoundError as error:
        raise UserError("VBench reads mp4, which imageio-ffmpeg writes: pip install imageio-ffmpeg.") from error
