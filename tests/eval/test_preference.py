import importlib.util
import json
import re
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, resize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fastdiff.data.fashion import random_captions, tokenizer
from fastdiff.errors import UserError
from fastdiff.eval.aesthetic import Aesthetic, linear_stack
from fastdiff.eval.evaluate import evaluate
from fastdiff.eval.hpsv2 import HPSv2
from fastdiff.eval.pickscore import PickScore
from fastdiff.eval.preference import CLIP_MEAN, CLIP_STD, PreferenceScore, cosines, cropped, letterboxed
from fastdiff.eval.preferences import folder_row, load_preference, preference_metric, preference_scores
from fastdiff.eval.subject import Subject

CAPTIONS = random_captions(6, 0)


def drawn(n: int = 6, height: int = 40, width: int = 40) -> Tensor:
    levels = torch.randint(256, (n, 3, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()) for x in images]


def scattered(network: nn.Module, seed: int = 0) -> None:
    """Weights so large that images and captions move the score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A folder of a tiny CLIP of transformers with the tokenizer of the bundled captions."""
    folder, words = tmp_path_factory.mktemp("hf") / "tiny", tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**size, **ids, "vocab_size": len(words), "max_position_embeddings": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 24, "patch_size": 8}, projection_dim=12))
    scattered(model)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(20.0).log())
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=24, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory):
    model = hps_network()
    scattered(model, seed=1)
    file = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {key: value.half() for key, value in model.state_dict().items()}}, file)
    return file


def hps_network() -> nn.Module:
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)


def hps(file, **options) -> HPSv2:
    return HPSv2(file, model=hps_network(), tokenizer=open_clip.get_tokenizer("ViT-H-14"), **options)


@pytest.fixture(scope="module")
def aesthetic_file(tmp_path_factory):
    sizes, state = (12, 9, 5, 4, 3, 1), {}
    generator = torch.Generator().manual_seed(2)
    for number, (wide, narrow) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:], strict=False), strict=True):
        state[f"layers.{number}.weight"] = torch.randn(narrow, wide, generator=generator)
        state[f"layers.{number}.bias"] = torch.randn(narrow, generator=generator)
    file = tmp_path_factory.mktemp("laion") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, file)
    return file


@pytest.fixture
def pickscore(clip_model):
    return PickScore(clip_model)


@pytest.fixture
def aesthetic(aesthetic_file, clip_model):
    return Aesthetic(aesthetic_file, clip=clip_model)


@pytest.fixture(params=["pickscore", "hpsv2.1", "aesthetic"])
def any_score(request, pickscore, hps_file, aesthetic):
    every: dict[str, PreferenceScore] = {score.name: score for score in (pickscore, hps(hps_file), aesthetic)}
    return every[request.param]


def test_batches_do_not_matter(any_score):
    images, captions = drawn(64), (random_captions(40, 1) + ["a red boot"] * 24)[:64]
    alone = any_score(images, captions, batch_size=1)
    assert alone.std() > 1e-3
    torch.testing.assert_close(any_score(images, captions, batch_size=64), alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())


def test_autocast_and_dropout_do_not_reach_a_score(any_score):
    images = drawn()
    alone = any_score(images, CAPTIONS)
    any_score.network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert any_score(images, CAPTIONS).equal(alone)


def test_the_mean_has_its_standard_error_and_its_conventions(any_score):
    images = drawn()
    found, values = any_score.score(images, CAPTIONS), any_score(images, CAPTIONS).double()
    assert found.value == pytest.approx(values.mean().item())
    assert found.se == pytest.approx(values.std().item() / 6**0.5)
    assert set(found.conventions) == {"model", "text", "image", "scale"}


def test_wrong_input_is_refused(any_score):
    with pytest.raises(UserError, match="6 images and 5 captions"):
        any_score(drawn(), CAPTIONS[:5])
    with pytest.raises(UserError, match="0 images"):
        any_score(drawn(0), [])
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        any_score(drawn() * 255, CAPTIONS)


def test_broken_weights_are_not_averaged(pickscore):
    with torch.no_grad():
        pickscore.network.visual_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="6 of 6 pickscore scores are not finite"):
        pickscore(drawn(), CAPTIONS)


def test_equal_embeddings_score_the_scale_and_opposite_ones_its_negative():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosines(2 * x, ["a", "b", "a"], lambda texts: x[: len(texts)])[:2], torch.ones(2))
    torch.testing.assert_close(cosines(x[:1], ["a"], lambda texts: -3 * x[:1]), -torch.ones(1))


def test_each_distinct_caption_is_embedded_once_and_meets_its_own_images():
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> Tensor:
        asked.append(texts)
        return torch.eye(2)[: len(texts)]

    found = cosines(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), ["a", "b", "a"], embed)
    assert asked == [["a", "b"]]
    assert found.tolist() == [1, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 24), (24, 27), (61, 27)])
def test_pickscore_is_transformers_own_logit(clip_model, pickscore, height, width):
    images = drawn(6, height, width)
    model, words = CLIPModel.from_pretrained(clip_model).eval(), tokenizer()
    pixels = CLIPImageProcessorPil.from_pretrained(clip_model)(pictures(images), return_tensors="pt").pixel_values
    torch.testing.assert_close(pickscore.prepare(images), pixels, rtol=1e-5, atol=1e-5)
    tokens = words(CAPTIONS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(pickscore(images, CAPTIONS), logits.diagonal(), rtol=1e-4, atol=1e-4)
    assert pickscore.conventions["scale"] == pytest.approx(20)
    assert logits.diagonal().abs().max() <= 20


def test_pickscore_cuts_long_captions_where_the_model_ends(pickscore):
    long = "white " * 30
    torch.testing.assert_close(pickscore(drawn(1), [long]), pickscore(drawn(1), [long + "boot"]))
    assert pickscore(drawn(1), [long]) != pickscore(drawn(1), ["white boot"])


def test_pickscore_says_what_its_folder_lacks(clip_model, tmp_path, monkeypatch):
    CLIPModel.from_pretrained(clip_model).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer: pass processor"):
        PickScore(tmp_path / "bare")
    assert PickScore(tmp_path / "bare", processor=clip_model)(drawn(), CAPTIONS).equal(PickScore(clip_model)(drawn(), CAPTIONS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"FASTDIFF_WEIGHTS names"):
        PickScore(tmp_path / "nowhere")


def test_hps_is_open_clips_cosine_of_the_loaded_weights(hps_file):
    score, model = hps(hps_file), hps_network()
    model.load_state_dict(torch.load(hps_file, weights_only=True)["state_dict"])
    images = drawn(6, 32, 32)
    pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    with torch.inference_mode():
        image, text = model.eval().encode_image(pixels), model.encode_text(open_clip.get_tokenizer("ViT-H-14")(CAPTIONS))
    torch.testing.assert_close(score(images, CAPTIONS), torch.cosine_similarity(image, text), rtol=1e-4, atol=1e-5)
    assert score.conventions["scale"] == 1
    assert (score.name, hps(hps_file, version="v2.0").name) == ("hpsv2.1", "hpsv2.0")


@pytest.mark.parametrize(("height", "width"), [(40, 40), (32, 20), (50, 71), (91, 40)])
def test_the_letterbox_is_torchvisions_resize_between_black(height, width):
    images = drawn(2, height, width)
    shape = tuple(round(n * 32 / max(height, width)) for n in (height, width))
    resized = resize(images, list(shape), InterpolationMode.BICUBIC, antialias=True)
    top, left = (32 - shape[0]) // 2, (32 - shape[1]) // 2
    expected = torch.zeros(2, 3, 32, 32)
    expected[:, :, top : top + shape[0], left : left + shape[1]] = resized
    torch.testing.assert_close(letterboxed(images, 32), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (91, 40), (32, 47), (20, 33), (32, 32)])
def test_the_crop_is_torchvisions_on_pictures(height, width):
    images = drawn(2, height, width)
    theirs = open_clip.image_transform(32, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="shortest")
    expected = torch.stack([theirs(picture) for picture in pictures(images)])
    torch.testing.assert_close(cropped(images, 32), expected, rtol=0, atol=1e-6)


def test_hps_refuses_weights_of_another_network_and_pickled_code(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="holds no weights of CLIP"):
        hps(tmp_path)
    torch.save({"state_dict": re.compile("x"), "hook": print}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="holds no plain tensors"):
        hps(tmp_path)
    with pytest.raises(UserError, match="no HPS 'v3'"):
        hps(tmp_path, version="v3")


def test_the_aesthetic_score_is_affine_in_the_unit_embedding(aesthetic, aesthetic_file, clip_model):
    state = torch.load(aesthetic_file, weights_only=True)
    weight, bias = torch.eye(12), torch.zeros(12)
    for number in (0, 2, 4, 6, 7):
        layer = state[f"layers.{number}.weight"]
        weight, bias = layer @ weight, layer @ bias + state[f"layers.{number}.bias"]
    model, images = CLIPModel.from_pretrained(clip_model).eval(), drawn()
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=aesthetic.prepare(images)).pooler_output
        embedding = F.normalize(model.visual_projection(pooled), dim=1)
    torch.testing.assert_close(aesthetic(images, CAPTIONS), (embedding @ weight.T + bias)[:, 0], rtol=1e-4, atol=1e-4)
    assert aesthetic(images, CAPTIONS).equal(aesthetic(images, ["other words"] * 6))


def test_the_aesthetic_score_refuses_the_embedding_of_another_clip(aesthetic_file, clip_model, tmp_path):
    state = torch.load(aesthetic_file, weights_only=True)
    torch.save({**state, "layers.0.weight": torch.zeros(9, 13)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"takes embeddings of 13 numbers and the model in .* gives 12"):
        Aesthetic(tmp_path / "wide.pth", clip=clip_model)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"layers.0.weight": torch.zeros(2, 3), "layers.0.bias": torch.zeros(2)},
        {"layers.0.weight": torch.zeros(1, 3)},
        {"layers.0.weight": torch.zeros(2, 3), "layers.0.bias": torch.zeros(2), "layers.1.weight": torch.zeros(1, 3)},
    ],
    ids=["empty", "no end", "no bias", "gap"],
)
def test_layers_that_do_not_fit_are_no_linear_stack(state):
    with pytest.raises(UserError, match=r"f\.pth holds no linear stack"):
        linear_stack(state, "layers.", "f.pth")


def test_missing_files_are_named_with_where_they_go(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    files = {"hpsv2.0": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt"}
    for name, file in {**files, "aesthetic": "sac+logos+ava1-l14-linearMSE.pth"}.items():
        with pytest.raises(UserError, match=rf"{re.escape(file)} .*is needed.*{re.escape(str(tmp_path))}.*FASTDIFF_WEIGHTS"):
            load_preference(name)


def test_the_hub_cache_is_looked_into_before_torchs(monkeypatch, tmp_path, hps_file):
    monkeypatch.delenv("FASTDIFF_WEIGHTS", raising=False)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, name: str(hps_file) if repo == "xswu/HPSv2" else None
    )
    assert hps(None).conventions["model"] == "HPS_v2.1_compressed.pt, CLIP"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="v2_compressed"):
        hps(tmp_path, version="v2.0")  # an explicit folder is searched alone


def test_every_registered_score_goes_by_its_name(pickscore, hps_file, aesthetic):
    known = preference_scores()
    assert list(known) == ["pickscore", "hpsv2.0", "hpsv2.1", "imagereward", "aesthetic"]
    assert {score.name for score in (pickscore, hps(hps_file), aesthetic)} < set(known)
    with pytest.raises(UserError, match="no preference score 'clip'"):
        load_preference("clip")


def test_scores_are_columns_of_an_evaluation(pickscore, aesthetic):
    images = drawn()
    subject = Subject(name="stored", generate=lambda prompts, generators: images[: len(prompts)])
    row = evaluate(subject, CAPTIONS, preference_metric([pickscore, aesthetic]), repeats=1).row()
    assert row["pickscore"] == pytest.approx(pickscore.score(images, CAPTIONS).value)
    assert row["aesthetic_se"] == pytest.approx(aesthetic.score(images, CAPTIONS).se)


def test_a_folder_of_pictures_of_any_size_is_scored_in_the_order_of_their_names(pickscore, tmp_path):
    images = [drawn(1, 30 + 9 * i, 40)[0] for i in range(3)]
    for name, image in zip(("b.png", "a.png", "c.png"), images, strict=True):
        pictures(image[None])[0].save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    row = folder_row(tmp_path, CAPTIONS[:3], [pickscore])
    values = torch.cat([pickscore(images[i][None], [CAPTIONS[k]]) for k, i in enumerate((1, 0, 2))]).double()
    assert row["n"] == 3
    assert row["pickscore"] == pytest.approx(values.mean().item())
    assert row["pickscore_se"] == pytest.approx(values.std().item() / 3**0.5)
    assert json.loads(json.dumps(row["conventions"]))["pickscore"] == pickscore.conventions
    with pytest.raises(UserError, match=r"3 images .* for 2 captions"):
        folder_row(tmp_path, CAPTIONS[:2], [pickscore])
    Image.new("RGBA", (24, 24), (255, 0, 0, 128)).save(tmp_path / "d.png")
    with pytest.raises(UserError, match=r"d\.png has an alpha channel"):
        folder_row(tmp_path, CAPTIONS[:4], [pickscore])
    (tmp_path / "d.png").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read the image .*d\.png"):
        folder_row(tmp_path, CAPTIONS[:4], [pickscore])


def test_the_program_writes_the_row_of_a_folder(clip_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_WEIGHTS", str(tmp_path))
    shutil.copytree(clip_model, tmp_path / "PickScore_v1")
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures(drawn(2))):
        picture.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS[:2]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("preference", Path(__file__).parents[2] / "eval" / "preference.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main(tmp_path / "images", tmp_path / "captions.txt", ("pickscore",), tmp_path / "out" / "row.json")
    row = json.loads((tmp_path / "out" / "row.json").read_text())
    assert row["pickscore"] == pytest.approx(PickScore(clip_model).score(drawn(2), CAPTIONS[:2]).value)
    with pytest.raises(UserError, match="cannot read the captions' file"):
        program.main(tmp_path / "images", tmp_path / "nowhere.txt", ("pickscore",))
