"""Folders of images: the same bytes after interruptions and from several processes, and none of other settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing_runs import BATCH, PROMPTS, N, as_rank, killed, subject
from PIL import Image
from torch import Tensor

from fastdiff.data.fashion import random_captions
from fastdiff.errors import UserError
from fastdiff.eval.generate import generate
from fastdiff.eval.generation import Generation, image_path
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.eval.subject import Subject, prompts_hash


def files(folder: Path) -> dict[str, bytes]:
    """What the folder holds, without the times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith("generation-cost-")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    assert generate(subject(), PROMPTS, folder, batch_size=BATCH) == N
    return folder


def test_images_are_rounded_to_8_bits_and_the_header_says_what_made_them(straight):
    expected = subject().draw(PROMPTS, seed=0, indices=range(N))
    for i in range(N):
        pixels = torch.from_numpy(np.asarray(Image.open(image_path(straight, i))).copy()).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(pixels, expected[i], rtol=0, atol=0.5 / 255 + 1e-5)
    made = Generation.open(straight)
    assert made.missing() == []
    assert (made.nfe, made.drawn, made.calls) == (2.0, N, 2 * N)
    assert made.images_per_s == pytest.approx(N / made.seconds)
    assert made.settings == {
        "identity": "tiny",
        "n": N,
        "prompts_sha256": prompts_hash(PROMPTS),
        "seed": 0,
        "steps": 2,
        "guidance_scale": 1.0,
        "resolution": [8, 8],
        "noise": "image",
        "image": "png, 8 bits, rounded",
    }
    assert made.known["parameters_m"] == 84e-6
    assert [path.name for path in straight.iterdir() if path.name.startswith(".")] == []


def test_a_finished_folder_is_left_as_it_is(straight):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in straight.iterdir()}
    finished: list[int] = []
    assert generate(subject(), PROMPTS, straight, batch_size=BATCH, progress=finished.append) == 0
    assert finished == [3, 3, 3, 2]
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in straight.iterdir()} == before


def test_a_killed_run_goes_on_to_the_same_bytes_with_an_honest_count(straight, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(killed, (str(tmp_path / "a"), 7), nprocs=1)
    assert Generation.open(tmp_path / "a").missing() == [6, 7, 8, 9, 10]
    assert Generation.open(tmp_path / "a").calls == 2 * 6
    image_path(tmp_path / "a", 7).with_name(".000007.part.png").write_bytes(b"half")
    assert generate(subject(), PROMPTS, tmp_path / "a", batch_size=BATCH) == 5
    assert files(tmp_path / "a") == files(straight)
    made = Generation.open(tmp_path / "a")
    assert (made.nfe, made.drawn, made.calls) == (2.0, N, 2 * N)


def test_a_half_written_block_is_drawn_whole_and_counted_as_drawn(straight, tmp_path):
    generate(subject(), PROMPTS, tmp_path, batch_size=BATCH)
    kept = image_path(tmp_path, 3).stat().st_mtime_ns
    for i in (4, 10):
        image_path(tmp_path, i).unlink()
    asked: list[list[str]] = []
    inner = subject()

    def draw(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        asked.append(prompts)
        return inner.generate(prompts, generators)

    assert generate(replace(inner, generate=draw), PROMPTS, tmp_path, batch_size=BATCH) == 2
    assert asked == [["3", "4", "5"], ["9", "10"]]
    assert image_path(tmp_path, 3).stat().st_mtime_ns == kept
    assert files(tmp_path) == files(straight)
    made = Generation.open(tmp_path)
    assert (made.drawn, made.nfe) == (N + 5, 2.0)


def test_two_processes_with_uneven_shares_write_what_one_writes(straight, tmp_path):
    folder = tmp_path / "a"
    torch.multiprocessing.spawn(as_rank, (2, str(folder)), nprocs=2)
    told = [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in range(2)]
    assert told == [{"rank": 0, "world_size": 2, "written": 6}, {"rank": 1, "world_size": 2, "written": 5}]
    assert files(folder) == files(straight)
    made = Generation.open(folder)
    assert (made.drawn, made.nfe) == (N, 2.0)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_shares_are_disjoint_and_complete_in_any_order_of_ranks(world_size, straight, tmp_path):
    written = [
        generate(subject(), PROMPTS, tmp_path, batch_size=BATCH, rank=rank, world_size=world_size)
        for rank in reversed(range(world_size))
    ]
    assert sum(written) == N
    assert files(tmp_path) == files(straight)
    assert Generation.open(tmp_path).drawn == N


def test_another_batch_size_changes_rounding_at_most(straight, tmp_path):
    generate(subject(), PROMPTS, tmp_path, batch_size=64)
    for i in range(N):
        a, b = (np.asarray(Image.open(image_path(folder, i))).astype(int) for folder in (straight, tmp_path))
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "differ in seed: 0 there, 1 asked for. Pass"),
        ({"prompts": PROMPTS[::-1]}, "differ in prompts_sha256: '[0-9a-f]{64}' there, '[0-9a-f]{64}' asked for. Pass"),
        ({"prompts": PROMPTS[:-1]}, "differ in n: 11 there, 10 asked for; prompts_sha256"),
        (
            {"subject": replace(subject(), steps=3, guidance_scale=2.0)},
            "differ in steps: 2 there, 3 asked for; guidance_scale: 1.0",
        ),
        ({"subject": subject(name="other")}, "differ in identity: 'tiny' there, 'other' asked for. Pass"),
        ({"subject": replace(subject(), resolution=(8, 16))}, r"differ in resolution: \[8, 8\] there, \[8, 16\] asked for. Pass"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_the_names_of_the_fields(change, message, straight):
    before = files(straight)
    options = {"subject": subject(), "prompts": PROMPTS, "folder": straight, "batch_size": BATCH, **change}
    with pytest.raises(UserError, match=message):
        generate(**options)
    assert files(straight) == before


def test_images_of_unknown_origin_and_other_mistakes_are_refused(straight, tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(UserError, match="nobody knows of what"):
        generate(subject(), PROMPTS, tmp_path)
    with pytest.raises(UserError, match=r"has no generation\.json"):
        Generation.open(tmp_path)
    stored = Subject(name="folder", stored=lambda ids: torch.zeros(len(ids), 3, 8, 8))
    with pytest.raises(UserError, match="folder of images already"):
        generate(stored, PROMPTS, tmp_path / "new")
    with pytest.raises(UserError, match="0 prompts"):
        generate(subject(), [], tmp_path / "new")
    with pytest.raises(UserError, match="rank 2 of 2"):
        generate(subject(), PROMPTS, tmp_path / "new", rank=2, world_size=2)
    assert not (tmp_path / "new").exists()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "generation.json").write_text('{"format"')
    with pytest.raises(UserError, match="is no JSON"):
        Generation.open(tmp_path / "cut")


def test_broken_images_are_not_written(tmp_path):
    bad = replace(subject(), generate=lambda prompts, generators: torch.full((len(prompts), 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        generate(bad, PROMPTS, tmp_path)
    assert Generation.open(tmp_path).missing() == list(range(N))
    assert Generation.open(tmp_path).nfe is None


def test_a_guided_pipeline_is_counted_and_its_weights_are_its_identity(teacher, tmp_path):
    prompts = random_captions(3, 0)
    made = pipeline_subject("teacher", teacher, steps=2, guidance_scale=3.0)
    generate(made, prompts, tmp_path, batch_size=2)
    assert Generation.open(tmp_path).nfe == 4
    bias = teacher.unet.conv_out.bias
    with torch.no_grad():
        bias += 1
    try:
        with pytest.raises(UserError, match="differ in identity"):
            generate(pipeline_subject("teacher", teacher, steps=2, guidance_scale=3.0), prompts, tmp_path, batch_size=2)
    finally:
        with torch.no_grad():
            bias -= 1
