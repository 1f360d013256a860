"""What a reader gets of results: a table for the terminal, a picture, a JSON file and one self-contained page.

The page needs no network and no script: its grid is an inline PNG and its plot of quality against network calls inline
SVG. In a grid every row is a model and every column a prompt with one initial noise, so that columns can be compared by
eye.
"""

import base64
import html
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastdiff.eval.evaluate import Result
from fastdiff.eval.plot import number, plot_svg
from fastdiff.files import aside

COLUMNS = {
    "model": "model",
    "steps": "steps",
    "nfe": "NFE",
    "guidance_scale": "guidance",
    "fd": "FD",
    "clip": "CLIP",
    "attributes": "attributes",
    "latency_ms_p50": "ms (p50)",
    "latency_ms_p95": "ms (p95)",
    "images_per_s": "images/s",
    "peak_memory_mib": "peak MiB",
    "energy_j": "J/image",
    "parameters_m": "M params",
    "pipeline_parameters_m": "M params (pipeline)",
    "size_mb": "MB on disk",
    "n": "n",
}
_LIBRARIES = ("fastdiff", "torch", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft")
_LABEL, _TEXT = 120, 12  # width of the row labels and height of a line of text, in pixels
_READING = (
    "± is one standard error. NFE counts passes of one image through the network: guidance counts two. FD is biased by "
    "the number of images n: compare rows of equal n only; the row of real images is its floor. Latency is that of one "
    "image by itself, from prompt to pixels, after warm-up; images/s that of large batches."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
"""


def cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """A row as text: four digits, ``value ± error`` where the row has ``<column>_se``, - for what does not apply."""
    return [number(row.get(c)) + (f" ± {row[f'{c}_se']:.2g}" if row.get(f"{c}_se") is not None else "") for c in columns]


def shown_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some row fills: the known ones in their order, then a protocol's own."""
    keys = dict.fromkeys([*COLUMNS, *(k for row in rows for k in row if not k.endswith("_se"))])
    return [k for k in keys if any(row.get(k) is not None for row in rows)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned plain text, one line a model."""
    columns = shown_columns(rows)
    lines = [[COLUMNS.get(c, c) for c in columns], *(cells(row, columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def grid(images: Mapping[str, Tensor], prompts: Sequence[str], *, columns: int = 10, size: int = 96) -> Image.Image:
    """A picture with a row for each model and a column for each of the first ``columns`` prompts.

    Args:
        images: model name to images [N, 3, H, W] in [0, 1]; image i of every model is of prompt i.
        size: shown width and height of an image in pixels, enlarged without smoothing.
    """
    columns, font = min(columns, len(prompts)), ImageFont.load_default()
    titles = [wrap(prompt, size // 7) for prompt in prompts[:columns]]
    top = _TEXT * max(len(lines) for lines in titles) + 6
    sheet = Image.new("RGB", (_LABEL + columns * size, top + len(images) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for j, lines in enumerate(titles):
        draw.multiline_text((_LABEL + j * size + 3, 2), "\n".join(lines), fill="black", font=font, spacing=0)
    for i, (name, tensor) in enumerate(images.items()):
        label, y = "\n".join(wrap(name, _LABEL // 7)), top + i * size
        draw.multiline_text((3, y + 4), label, fill="black", font=font, spacing=2)
        for j, image in enumerate(tensor[:columns]):
            sheet.paste(eight_bit(image).resize((size, size), Image.Resampling.NEAREST), (_LABEL + j * size, y))
    return sheet


def eight_bit(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [0, 1] in 8 bits, rounded to the nearest level."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous().numpy())


def grid_png(path: str | Path, images: Mapping[str, Tensor], prompts: Sequence[str], *, columns: int = 10, size: int = 96) -> None:
    """Write ``grid`` as a PNG."""
    with aside(path) as part:
        grid(images, prompts, columns=columns, size=size).save(part, format="PNG")


def rows_json(path: str | Path, results: Sequence[Result], **facts: Any) -> None:
    """Write ``{"rows": [...], **facts}``; a number that is not finite is an error, as JSON has none."""
    with aside(path) as part:
        part.write_text(json.dumps({"rows": [r.row() for r in results], **facts}, indent=2, allow_nan=False) + "\n")


def environment() -> dict[str, str]:
    """What a measurement depends on besides the code: versions, processor, threads, GPU."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):  # a library that is not installed has no version to report
            facts[name] = version(name)
    facts |= {"cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def html_report(
    path: str | Path,
    results: Sequence[Result],
    *,
    title: str = "fastdiff evaluation",
    command: str = "",
    facts: Mapping[str, Any] | None = None,
    columns: int = 10,
) -> None:
    """Write one self-contained page: table, grid, plot, how the numbers were made, environment.

    Args:
        command: shown as given, the line that makes the page again.
        facts: further name-value pairs, such as the conventions of the CLIP score, the seed or the time of training.
    """
    rows = [r.row() for r in results]
    buffer = io.BytesIO()
    grid({r.model: r.images for r in results}, results[0].prompts, columns=columns).save(buffer, format="PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    columns_shown = shown_columns(rows)
    head = [COLUMNS.get(c, c) for c in columns_shown]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _html_table([cells(row, columns_shown) for row in rows], head=head),
        f"<p>{_READING}</p>",
        f'<h2>Images</h2><img alt="one row a model, one column a prompt" src="{picture}">',
        f"<h2>Quality against network calls</h2>{plot_svg(rows)}",
        f"<h2>How it was made</h2><pre>{html.escape(command)}</pre>",
        _html_table([[k, str(v)] for k, v in {**(facts or {}), **environment()}.items()]),
    ]
    start = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    with aside(path) as part:
        part.write_text(f"{start}<style>{_STYLE}</style>{''.join(parts)}</html>\n", encoding="utf-8")


def _html_table(lines: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    def row(texts: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return f"<table>{row(head, 'th') if head else ''}{''.join(row(line, 'td') for line in lines)}</table>"
