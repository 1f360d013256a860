"""``fastdiff eval --protocol``: what is asked of the pipelines, what is kept of a row, and which scores it has."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from fastdiff.cli.main import main
from fastdiff.eval.noise import generators
from fastdiff.eval.report import read_rows
from fastdiff.eval.sources import open_pipeline

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


def test_a_killed_run_keeps_its_finished_rows_and_the_next_does_not_measure_them_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_pictures(world.folder / name, seed=seed) for name, seed in (("first", 1), ("second", 2)))
    whole = (second / "000003.png").read_bytes()
    (second / "000003.png").write_bytes(b"\x89PNG broken")
    assert main(world.words(first, second)) == 2  # the second row stops the run
    kept = world.folder / "images" / "first.row.json"
    metrics = json.loads(kept.read_text())["result"]["metrics"]
    assert not (world.folder / "out.json").exists()
    (second / "000003.png").write_bytes(whole)
    capsys.readouterr()
    assert main(world.words(first, second)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "finished row" in line]
    assert len(said) == 1
    assert said[0].endswith(f"first: its finished row is read from {kept}")
    row, other = read_rows(world.folder / "out.json")
    assert {key: row[key] for key in metrics} == metrics
    assert other["fd"] != row["fd"]


def test_a_kept_row_of_a_pipeline_is_not_timed_again(world: World, unconditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(world.words(unconditional, out="before.json")) == 0
    monkeypatch.setattr("fastdiff.eval.measure.latency", None)  # a call would fail
    assert main(world.words(unconditional, out="after.json")) == 0
    assert read_rows(world.folder / "before.json") == read_rows(world.folder / "after.json")


@pytest.mark.parametrize("what", ["image", "reference", "protocol"])
def test_a_kept_row_of_other_images_reference_or_protocol_is_measured_again(world: World, what: str) -> None:
    mine = write_pictures(world.folder / "mine", seed=1)
    assert main(world.words(mine, out="before.json")) == 0
    if what == "protocol":
        world.protocol(neighbours=2)
    else:
        write_pictures(world.folder / "new", 1, seed=2)
        (world.folder / "new" / "000000.png").replace((mine if what == "image" else world.folder / "real") / "000000.png")
    assert main(world.words(mine, out="after.json")) == 0
    before, after = (read_rows(world.folder / f"{name}.json")[0] for name in ("before", "after"))
    changed = {"image": "fd", "reference": "fd", "protocol": "density"}[what]
    assert before[changed] != after[changed]
    if what == "protocol":
        assert before["fd"] == after["fd"]


def test_a_folder_and_the_statistics_of_it_are_one_reference(world: World, tmp_path: Path) -> None:
    mine = write_pictures(tmp_path / "mine", seed=1)
    words = ["eval", "stats", str(tmp_path / "real"), f"--protocol={tmp_path / 'mine.toml'}", "--workers", "0"]
    assert main([*words, f"--output={tmp_path / 'real.npz'}"]) == 0
    assert main(world.words(mine)) == 0
    assert main([*world.words(mine, out="of_file.json"), f"--reference={tmp_path / 'real.npz'}"]) == 0
    of_folder, of_file = (json.loads((tmp_path / name).read_text()) for name in ("out.json", "of_file.json"))
    assert of_folder["protocol"] == of_file["protocol"]
    assert of_file["rows"][0]["fd"] == pytest.approx(of_folder["rows"][0]["fd"], rel=1e-6)
    assert "kid" not in of_file["rows"][0]  # the kept row of the folder was not taken for it
    assert main(["eval", "compare", str(tmp_path / "of_file.json"), str(tmp_path / "out.json")]) == 0


def test_the_resolution_and_the_scheduler_of_a_protocol_are_those_that_draw(
    world: World, stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.protocol(n=2, resolution=48, scheduler="LCMScheduler", prompts="ours", steps=1)
    (tmp_path / "prompts.txt").write_text("a zebra\na boot\n")
    prompts = f"--prompts={tmp_path / 'prompts.txt'}"
    assert main([*world.words(stranger), prompts]) == 0
    drawn = tmp_path / "images" / f"{stranger.name}-1-own"
    assert Image.open(drawn / "000000.png").size == (48, 48)
    own = open_pipeline(stranger, scheduler="LCMScheduler")
    own.set_progress_bar_config(disable=True)
    want = own(
        ["a zebra", "a boot"], num_inference_steps=1, height=48, width=48, generator=generators(0, range(2)), output_type="np"
    )
    found = np.stack([np.asarray(Image.open(drawn / f"{i:06d}.png")) for i in range(2)])
    assert np.abs(found - want.images * 255).max() <= 0.501
    assert main([*world.words(drawn, out="again.json"), prompts]) == 0
    records = [json.loads((tmp_path / name).read_text())["protocol"] for name in ("out.json", "again.json")]
    assert records[0] == records[1]
    assert (records[0]["resolution"], records[0]["scheduler"]) == (48, "LCMScheduler")
    world.protocol(n=2, resolution=50, prompts="ours", steps=1)
    assert main([*world.words(stranger), prompts]) == 2
    assert "images of 50 pixels cannot be made" in capsys.readouterr().err


def test_a_pipeline_that_takes_no_size_must_have_that_of_the_protocol(
    world: World, unconditional: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.protocol(n=2, resolution=8)
    assert main(world.words(unconditional)) == 0
    assert read_rows(world.folder / "out.json")[0]["n"] == 2
    world.protocol(n=2, resolution=32)
    assert main(world.words(unconditional)) == 2
    assert "whose images are 8x8 and not of 32 pixels a side" in capsys.readouterr().err


def test_a_student_keeps_its_scheduler_and_stands_beside_its_teacher(world: World, stranger: Path, tmp_path: Path) -> None:
    student = shutil.copytree(stranger, tmp_path / "student")
    (student / "fastdiff.json").write_text("{}")
    world.protocol(n=2, scheduler="LCMScheduler", prompts="ours", steps=1)
    (tmp_path / "prompts.txt").write_text("a zebra\na boot\n")
    assert main([*world.words(stranger, student), f"--prompts={tmp_path / 'prompts.txt'}"]) == 0
    assert [row["steps"] for row in read_rows(tmp_path / "out.json")] == [1, 50]
    assert json.loads((tmp_path / "out.json").read_text())["protocol"]["scheduler"] == "LCMScheduler"


def test_a_sweep_under_a_protocol_has_a_row_a_cell(world: World, stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a zebra\na boot\n")
    picture, named = (
        tmp_path / "sweep.png",
        {"protocol": "mine.toml", "reference": "real", "images": "images", "prompts": "prompts.txt"},
    )
    words = [f"--{key}={tmp_path / name}" for key, name in named.items()] + ["--workers", "0", f"--output={picture}"]
    cells = ["--num-images", "2", "--steps", "1", "2", "--guidance", "1", "2"]
    assert main(["eval", "sweep", str(stranger), *words, *cells]) == 0
    rows = read_rows(picture.with_suffix(".json"))
    assert [(row["steps"], row["guidance_scale"], row["nfe"]) for row in rows] == [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4)]
    assert len({row["fd"] for row in rows}) == 4
    assert Image.open(picture).size[0] > 100


def test_a_sweep_of_a_pipeline_without_guidance_has_one_line(world: World, unconditional: Path, tmp_path: Path) -> None:
    named = {"protocol": "mine.toml", "reference": "real", "images": "images", "output": "sweep.png"}
    words = [f"--{key}={tmp_path / name}" for key, name in named.items()]
    assert main(["eval", "sweep", str(unconditional), *words, "--workers", "0", "--steps", "1", "2", "--guidance"]) == 0
    assert [(row["steps"], row["nfe"]) for row in read_rows(tmp_path / "sweep.json")] == [(1, 1), (2, 2)]
    world.protocol(steps=4)
    assert main(["eval", "sweep", str(unconditional), *words, "--guidance"]) == 2
