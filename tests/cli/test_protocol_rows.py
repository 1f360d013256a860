"""``fastdiff eval --protocol``: what is asked of the pipelines, what is kept of a row, and which scores it has."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from fastdiff.cli.main import main
from fastdiff.eval.report import read_rows

N = 6


@dataclass(frozen=True)
class World:
    """A protocol of random features, a reference and a place for what is drawn."""

    folder: Path

    def words(self, *sources: str | Path, out: str = "out.json") -> list[str]:
        named = {"protocol": "mine.toml", "reference": "real", "images": "images", "json": out}
        options = [f"--{key}={self.folder / name}" for key, name in named.items()]
        return ["eval", *map(str, sources), *options, "--workers", "0"]

    def protocol(self, **choices: str | int) -> None:
        values = {
            "n": N,
            "prompts": "unconditional",
            "preprocess": "torch-bicubic",
            "extractor": "random-conv",
            "reference": "mine",
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**values, **choices}.items()]
        (self.folder / "mine.toml").write_text("\n".join(lines))


def write_pictures(folder: Path, n: int = N, *, seed: int = 0, side: int = 8) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    write_pictures(tmp_path / "real")
    found = World(tmp_path)
    found.protocol()
    return found


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 8x8 images that takes no prompt and no guidance."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 8)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    folder = tmp_path_factory.mktemp("models") / "ddim"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder


def test_an_unconditional_pipeline_is_called_bare_and_its_row_says_what_it_took(world: World, unconditional: Path) -> None:
    assert main(world.words(unconditional)) == 0
    (row,) = read_rows(world.folder / "out.json")
    assert (row["model"], row["steps"], row["guidance_scale"], row["nfe"]) == ("ddim (50 steps)", 50, 1.0, 50)  # DDIMPipeline's own
    assert len(list((world.folder / "images" / "ddim").glob("*.png"))) == N


def test_a_guided_pipeline_is_called_bare_and_its_row_says_its_own_guidance(world: World, stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a zebra\na boot\n")
    words = [*world.words(stranger), f"--prompts={tmp_path / 'prompts.txt'}", "--num-images", "2", "--teacher-steps", "2"]
    assert main(words) == 0
    (row,) = read_rows(world.folder / "out.json")
    assert (row["steps"], row["guidance_scale"], row["nfe"]) == (2, 7.5, 4)  # StableDiffusionPipeline's own
    assert (tmp_path / "images" / f"{stranger.name}-2-own").is_dir()


def test_the_bundled_teacher_keeps_its_25_steps_and_guidance_3(tmp_path: Path) -> None:
    words = ["eval", "fashion", "--protocol", "fashion", "--num-images", "2", "--workers", "0"]
    assert main([*words, f"--images={tmp_path / 'images'}", f"--json={tmp_path / 'out.json'}"]) == 0
    assert [(row["steps"], row["guidance_scale"]) for row in read_rows(tmp_path / "out.json")] == [(25, 3.0)]


def test_steps_below_one_are_refused(world: World, stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*world.words(stranger), "--teacher-steps", "0"]) == 2
    assert "--teacher-steps holds 0" in capsys.readouterr().err
