"""Each benchmark's folder is read back as its own scorer walks it."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from PIL import Image
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.eval.exporters import EXPORTERS, dpg_bench, export, geneval, t2i_compbench, vbench
from fastdiff.eval.exporters.plan import file_name
from fastdiff.eval.exporters.vbench import save_mp4, video_subject
from fastdiff.eval.noise import image_generator
from fastdiff.eval.pipeline import pipeline_subject
from fastdiff.eval.subject import Subject


def coloured(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
    """Green tells the prompt by its length, red the noise, so that a picture in the wrong place shows."""
    red = torch.cat([torch.rand(1, generator=own) for own in generators])
    green = torch.tensor([len(prompt) / 255 for prompt in prompts])
    return torch.stack([red, green, torch.zeros(len(prompts))], dim=1)[:, :, None, None].expand(-1, -1, 8, 8)


def moving(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
    return coloured(prompts, generators)[:, None].repeat(1, 6, 1, 4, 8)


SUBJECT, VIDEO = Subject(name="colours", generate=coloured), Subject(name="motion", generate=moving)


def colour(file: str | Path, box: tuple[int, int, int, int] | None = None) -> tuple[int, int]:
    """Red and green of a picture that is of one colour."""
    with Image.open(file) as opened:
        pixels = np.asarray(opened.convert("RGB").crop(box or (0, 0, *opened.size))).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return int(pixels[0, 0]), int(pixels[0, 1])


def expected(prompt: str, index: int, seed: int = 0) -> tuple[int, int]:
    return round(255 * torch.rand(1, generator=image_generator(seed, index)).item()), len(prompt)


def geneval_file(folder: Path, n: int = 3) -> Path:
    entries = [
        {"tag": "counting", "include": [{"class": "cup", "count": i + 2}], "prompt": f"a photo of {i + 2} cups" + "!" * i}
        for i in range(n)
    ]
    entries[-1]["prompt"] = "a «naïve» / odd: photo?"
    file = folder / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def geneval_scorer(folder: Path) -> list[tuple[str, dict]]:
    """All-digit folders, their one metadata object, and every samples/<digits>.png."""
    found = []
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((folder / name / "metadata.jsonl").read_text())
        for image in sorted(os.listdir(folder / name / "samples")):
            if re.match(r"\d+\.png", image):
                found.append((str(folder / name / "samples" / image), metadata))
    return found


def test_geneval_finds_four_images_of_each_prompt(tmp_path):
    source, out = geneval_file(tmp_path), tmp_path / "out"
    assert export(geneval(source), out, SUBJECT) == 12
    found = geneval_scorer(out)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert [metadata for _, metadata in found] == [line for line in lines for _ in range(4)]
    assert [colour(file) for file, _ in found] == [expected(metadata["prompt"], i) for i, (_, metadata) in enumerate(found)]
    assert Path(found[0][0]).relative_to(out) == Path("00000/samples/0000.png")
    assert Path(found[-1][0]).relative_to(out) == Path("00002/samples/0003.png")


def compbench_scorer(folder: Path) -> list[tuple[int, str, Path]]:
    """Every file of samples by the number behind the last underscore; the prompt is what stands before the first."""
    names = sorted(os.listdir(folder / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    return [(int(name.split(".png")[0].split("_")[1]), name.split("_")[0], folder / "samples" / name) for name in names]


def test_compbench_finds_ten_images_of_each_prompt_in_the_order_of_its_file(tmp_path):
    prompts = ["a green bench and a blue bowl", "The black lamp, «old», was on top of the table.", "a green bench and a blue bowl"]
    (tmp_path / "color_val.txt").write_text(f"{prompts[0]}\tseen\n{prompts[1]}\n{prompts[2]}\n", encoding="utf-8")
    assert export(t2i_compbench(tmp_path / "color_val.txt"), tmp_path / "out", SUBJECT) == 30
    found = compbench_scorer(tmp_path / "out")
    assert [key for key, _, _ in found] == list(range(30))
    assert [prompt for _, prompt, _ in found] == [prompt for prompt in prompts for _ in range(10)]
    assert [colour(file) for _, _, file in found] == [expected(prompt, key) for key, prompt, _ in found]
    assert found[0][2].name == "a green bench and a blue bowl_000000.png"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a snake_case cat", "cuts prompts at the first underscore"),
        ("either / or", "holds a slash"),
        ("", "is empty"),
        ("é" * 120, "over 249"),
    ],
)
def test_compbench_refuses_prompts_that_no_name_carries(tmp_path, line, message):
    (tmp_path / "val.txt").write_text(f"a cat\n{line}\na dog\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        t2i_compbench(tmp_path / "val.txt")


def test_the_longest_name_can_be_written(tmp_path):
    prompt = "x" * (249 - len("_000000.png"))
    (tmp_path / "val.txt").write_text(prompt, encoding="utf-8")
    export(t2i_compbench(tmp_path / "val.txt", per_prompt=1), tmp_path / "out", SUBJECT)
    assert compbench_scorer(tmp_path / "out")[0][:2] == (0, prompt)
    with pytest.raises(UserError, match="250 bytes"):
        file_name(prompt + "x", "_000000.png", benchmark="T2I-CompBench")


def test_dpg_bench_cuts_four_images_out_of_each_grid(tmp_path):
    (tmp_path / "prompts").mkdir()
    prompts = {"12": "a long prompt", "partiprompts3": "a longer\nprompt, of two lines"}
    for item, prompt in prompts.items():
        (tmp_path / "prompts" / f"{item}.txt").write_text(prompt + "\n", encoding="utf-8")
    assert export(dpg_bench(tmp_path / "prompts"), tmp_path / "out", SUBJECT) == 2
    names = sorted(os.listdir(tmp_path / "out"))
    assert [name.split(".")[0] for name in names] == list(prompts)
    for number, name in enumerate(names):
        boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
        found = [colour(tmp_path / "out" / name, box) for box in boxes]
        assert found == [expected(prompts[name.split(".")[0]], 4 * number + k) for k in range(4)]


def test_dpg_bench_refuses_what_its_scorer_would_cut_wrong(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.txt"):
        dpg_bench(tmp_path)
    (tmp_path / "1.txt").write_text("a cat")
    wide = Subject(name="wide", generate=lambda prompts, generators: torch.zeros(len(prompts), 3, 8, 16))
    with pytest.raises(UserError, match="8x16"):
        export(dpg_bench(tmp_path), tmp_path / "out", wide)
    (tmp_path / "a.b.txt").write_text("a cat")
    with pytest.raises(UserError, match="has a dot in its name"):
        dpg_bench(tmp_path)


def test_an_interrupted_run_goes_on_with_the_same_images(tmp_path):
    plan, calls = geneval(geneval_file(tmp_path)), []

    def fragile(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return coloured(prompts, generators)

    with pytest.raises(KeyboardInterrupt):
        export(plan, tmp_path / "cut", Subject(name="colours", generate=fragile), batch_size=2)
    assert [file.name for file in sorted((tmp_path / "cut").rglob("*.png"))] == [f"{k:04}.png" for k in range(4)]  # none is torn
    kept = tmp_path / "cut" / "00000" / "samples" / "0001.png"
    kept.write_bytes(kept.read_bytes() + b"kept")
    (tmp_path / "cut" / "00000" / "samples" / "0002.png").unlink()
    finished: list[int] = []
    assert export(plan, tmp_path / "cut", SUBJECT, batch_size=5, progress=finished.append) == 9
    assert finished == [5, 4]
    assert kept.read_bytes().endswith(b"kept")
    export(plan, tmp_path / "whole", SUBJECT)
    for (cut, one), (whole, other) in zip(geneval_scorer(tmp_path / "cut"), geneval_scorer(tmp_path / "whole"), strict=True):
        assert (colour(cut), one) == (colour(whole), other)
    assert export(plan, tmp_path / "cut", SUBJECT) == 0


def test_a_folder_does_not_mix_two_runs(tmp_path):
    source = geneval_file(tmp_path)
    export(geneval(source), tmp_path / "out", SUBJECT)
    with pytest.raises(UserError, match=r"seed 0 and not 1 \(says out\.export\.json\)"):
        export(geneval(source), tmp_path / "out", SUBJECT, seed=1)
    with pytest.raises(UserError, match="subject 'colours' and not 'other'"):
        export(geneval(source), tmp_path / "out", Subject(name="other", generate=coloured))
    with pytest.raises(UserError, match="per_prompt 4 and not 2"):
        export(geneval(source, per_prompt=2), tmp_path / "out", SUBJECT)
    with pytest.raises(UserError, match="prompts_sha256"):
        export(geneval(geneval_file(tmp_path, 2)), tmp_path / "out", SUBJECT)
    (tmp_path / "out.export.json").unlink()
    with pytest.raises(UserError, match="is not empty"):
        export(geneval(source), tmp_path / "out", SUBJECT)


def test_seeds_draw_other_images_and_broken_ones_are_not_written(tmp_path):
    plan = geneval(geneval_file(tmp_path))
    export(plan, tmp_path / "a", SUBJECT, seed=7)
    found = geneval_scorer(tmp_path / "a")
    assert colour(found[5][0]) == expected(found[5][1]["prompt"], 5, seed=7) != expected(found[5][1]["prompt"], 5)
    broken = Subject(name="nan", generate=lambda prompts, generators: torch.full((len(prompts), 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="are not finite"):
        export(plan, tmp_path / "b", broken)
    assert geneval_scorer(tmp_path / "a")[0][0].endswith("0000.png")
    assert not list((tmp_path / "b").rglob("*.png"))


@pytest.mark.parametrize("line", ["not json", '{"prompt": "a cat"}', '["a cat"]', ""])
def test_geneval_names_the_line_that_is_none_of_its(tmp_path, line):
    file = geneval_file(tmp_path)
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 4 of"):
        geneval(file)


def test_files_that_are_not_there_and_empty_ones_are_named(tmp_path):
    for name in ("geneval", "t2i-compbench"):
        with pytest.raises(UserError, match="cannot read"):
            EXPORTERS[name](tmp_path / "nothing")
        (tmp_path / "empty").write_text("")
        with pytest.raises(UserError, match="nothing to draw"):
            EXPORTERS[name](tmp_path / "empty")


def test_a_pipeline_draws_the_same_picture_alone_and_in_a_run(tmp_path, student):
    subject = pipeline_subject("student", student)
    export(geneval(geneval_file(tmp_path, 1), per_prompt=2), tmp_path / "out", subject)
    file, metadata = geneval_scorer(tmp_path / "out")[1]
    with Image.open(file) as opened:
        found = torch.from_numpy(np.array(opened)).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        found, subject.generate([metadata["prompt"]], [image_generator(0, 1)])[0], rtol=0, atol=0.5 / 255 + 1e-4
    )


@pytest.fixture
def full_info(tmp_path):
    entries = [
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a person, by Hokusai, in the style of Ukiyo", "dimension": ["human_action", "appearance_style"]},
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["object_class"]},
        {"prompt_en": "A house.", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "house"}}},
    ]
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps(entries))
    return file


def vbench_scorer(folder: Path, full_info: Path, dimension: str) -> dict[str, list[Path]]:
    """Five exact names a prompt of the dimension, with the suffix of the first file there is."""
    names = os.listdir(folder)
    suffix = Path(names[0]).suffix
    found: dict[str, list[Path]] = {}
    for entry in json.loads(full_info.read_text()):
        if dimension in entry["dimension"]:
            wanted = [f"{entry['prompt_en']}-{i}{suffix}" for i in range(5)]
            found[entry["prompt_en"]] = [folder / name for name in wanted if name in names]
    return found


def test_vbench_finds_five_videos_of_each_prompt(tmp_path, full_info):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    assert export(vbench(full_info, dimensions=["object_class"]), tmp_path / "out", VIDEO) == 10
    assert export(vbench(full_info), tmp_path / "out", VIDEO) == 5  # the third prompt
    assert {Path(name).suffix for name in os.listdir(tmp_path / "out")} == {".mp4"}
    for dimension, n in (("object_class", 2), ("appearance_style", 1)):
        found = vbench_scorer(tmp_path / "out", full_info, dimension)
        assert [len(videos) for videos in found.values()] == [5] * n
    reader = ffmpeg.read_frames(str(tmp_path / "out" / "A house.-3.mp4"))
    facts = next(reader)
    frames = [np.frombuffer(frame, dtype=np.uint8).reshape(32, 64, 3) for frame in reader]
    assert (facts["size"], facts["fps"], len(frames)) == ((64, 32), 8, 6)
    red, green = expected("A house.", 2 * 5 + 3)
    assert abs(frames[0][..., 0].mean() - red) < 5  # of 255, after H.264
    assert abs(frames[0][..., 1].mean() - green) < 5


def test_a_video_pipeline_draws_frames_from_its_generator(student):
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    parts = {"vae": student.vae, "text_encoder": student.text_encoder, "tokenizer": student.tokenizer}
    pipeline = TextToVideoSDPipeline(**parts, unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    subject = video_subject("tiny", pipeline, num_frames=3, num_inference_steps=1, guidance_scale=1.0)
    one, again, other = (subject.generate(["a red boot"], [image_generator(0, i)]) for i in (0, 0, 1))
    assert one.shape == (1, 3, 3, 32, 32)
    assert one.equal(again)
    assert not one.equal(other)
    assert (subject.steps, subject.guidance_scale) == (1, 1.0)


def test_vbench_refuses_images_odd_sizes_and_foreign_files(tmp_path, full_info, student):
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(UserError, match="scores motion"):
        export(vbench(full_info), tmp_path / "out", SUBJECT)
    with pytest.raises(UserError, match="draws images, and VBench scores motion"):
        export(vbench(full_info), tmp_path / "student", video_subject("student", student))
    with pytest.raises(UserError, match="both sides must be even"):
        save_mp4(torch.zeros(1, 2, 3, 8, 9), tmp_path / "odd.mp4")
    with pytest.raises(UserError, match="has the dimension colour: it has appearance_style"):
        vbench(full_info, dimensions=["colour"])
    with pytest.raises(UserError, match=r"is no VBench_full_info\.json"):
        vbench(geneval_file(tmp_path))


def test_vbench_asks_for_its_writer_before_it_draws(full_info, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        vbench(full_info)


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program_exports_a_saved_pipeline(tmp_path, student, capsys):
    student.save_pretrained(tmp_path / "student")
    source, main = geneval_file(tmp_path, 1), program("export_benchmark").main
    main("geneval", source, str(tmp_path / "student"), tmp_path / "out")
    assert len(geneval_scorer(tmp_path / "out")) == 4
    main("geneval", source, str(tmp_path / "student"), tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 4 files drawn")
