"""DPG-Bench: long prompts, asked about piece by piece.

    <folder>/<item id>.png   four images of its prompt as a 2 x 2 grid, row by row

(Hu et al., "ELLA: equip diffusion models with LLM for enhanced semantic alignment", 2024, arXiv:2403.05135.) Layout read in
``dpg_bench/compute_dpg_bench.py`` of ``TencentQQGYLab/ELLA``: item id = name up to the first dot, the images are the squares of
``--resolution`` at (0, 0), (right, 0), (0, down), (right, down), the first ``--pic-num`` of them; every file of the folder is
taken for an image. Prompts: their ``dpg_bench/prompts/<item id>.txt``.
"""

from pathlib import Path

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.exporters.plan import Piece, Plan, digest, read_text, save_png

PER_PROMPT = 4


def dpg_bench(source: str | Path) -> Plan:
    """The plan of their folder ``dpg_bench/prompts``; call the scorer with ``--pic-num 4 --resolution`` the side of one image.

    Raises:
        UserError: there are no ``*.txt``, one is empty, or a name holds a dot, behind which the scorer does not read.
    """
    files = sorted(Path(source).glob("*.txt"))
    prompts = {file.stem: read_text(file, "DPG-Bench's folder dpg_bench/prompts").strip() for file in files}
    for item, prompt in prompts.items():
        if "." in item or not prompt:
            raise UserError(f"{item}.txt in {source} is empty or has a dot in its name: DPG-Bench reads ids up to the first.")
    if not prompts:
        raise UserError(f"{source} holds no *.txt: pass DPG-Bench's folder dpg_bench/prompts.")
    pieces = [
        Piece(f"{item}.png", prompt, tuple(range(number * PER_PROMPT, (number + 1) * PER_PROMPT)))
        for number, (item, prompt) in enumerate(prompts.items())
    ]
    source_sha256 = digest("\n".join(f"{item}\t{prompt}" for item, prompt in prompts.items()))
    return Plan(benchmark="DPG-Bench", source_sha256=source_sha256, per_prompt=PER_PROMPT, pieces=pieces, save=save_grid)


def save_grid(images: Tensor, path: Path) -> None:
    """Square images [4, 3, S, S] as one PNG of side 2 S; ``UserError`` when they are not square."""
    if images.shape[2] != images.shape[3]:
        raise UserError(f"images are {images.shape[2]}x{images.shape[3]}: DPG-Bench cuts its grid into squares, so draw squares.")
    rows = torch.cat([torch.cat([images[0], images[1]], dim=2), torch.cat([images[2], images[3]], dim=2)], dim=1)
    save_png(rows[None], path)
