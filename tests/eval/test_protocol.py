import dataclasses
import hashlib
import json
import re

import pytest

from fastdiff.errors import UserError
from fastdiff.eval.extractors import EXTRACTORS
from fastdiff.eval.fashion import REFERENCE
from fastdiff.eval.protocol import FOLDER, Protocol, comparable, presets
from fastdiff.eval.weights import sha256

NAMES = "cifar10-edm clean coco10k-sdxl coco30k-dmd2 coco30k-swiftbrush fashion fashion-tiny imagenet256-adm imagenet64-edm mjhq30k"

COMMENTARY = ("name", "about", "sources", "recalled")


def own(**options) -> Protocol:
    return Protocol(
        **{"name": "own", "n": 100, "prompts": "p", "preprocess": "clean", "extractor": "e", "reference": "r", **options}
    )


def test_all_presets_load_and_no_two_are_the_same_protocol():
    assert presets() == NAMES.split()
    found = [Protocol.load(name) for name in presets()]
    assert len({p.hash for p in found}) == len(found)
    for protocol in found:
        assert protocol.extractor in EXTRACTORS
        assert protocol.sources


def test_the_hash_is_that_of_the_canonical_json_written_by_hand():
    protocol = own(guidance_scale=3)
    kept = [f.name for f in dataclasses.fields(Protocol) if f.name not in {*COMMENTARY, "further"}]
    values = {name: getattr(protocol, name) for name in kept}
    text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(values[k])}" for k in sorted(values)) + "}"
    assert '"guidance_scale":3.0' in text
    assert protocol.hash == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_every_choice_changes_the_hash_and_no_comment_does():
    base = own(noise="stream")
    other = {"tuple": ("CMMD: clip",), "str": "torch-bicubic", "int": 77, "float": 0.5}
    for item in dataclasses.fields(Protocol):
        if item.name in COMMENTARY:
            continue
        value = other[next(k for k in other if k in str(item.type))]
        value = {"noise": "batch", "clip_clamp": "mean"}.get(item.name, value)
        assert dataclasses.replace(base, **{item.name: value}).hash != base.hash, item.name
    assert own(name="x", about="y", sources=("z",), recalled=("n",), noise="stream").hash == base.hash


def test_whole_and_decimal_numbers_hash_alike_and_key_order_does_not_matter(tmp_path):
    lines = ["n = 100", 'prompts = "p"', 'preprocess = "clean"', 'extractor = "e"', 'reference = "r"']
    (tmp_path / "a.toml").write_text("\n".join([*lines, "guidance_scale = 3"]))
    (tmp_path / "b.toml").write_text("\n".join(["guidance_scale = 3.0", *reversed(lines)]))
    assert Protocol.load(tmp_path / "a.toml").hash == Protocol.load(tmp_path / "b.toml").hash == own(guidance_scale=3).hash


def test_the_label_names_images_and_hash():
    protocol = Protocol.load("fashion")
    assert re.fullmatch(r"FD\[fashion\]-2k#[0-9a-f]{8}", protocol.label("FD[fashion]"))
    assert protocol.replace(n=1234).label("x").startswith("x-1234#")


def test_a_deviation_is_printed_in_the_name():
    changed = Protocol.load("coco30k-dmd2").replace(n=5000, seed=10)
    assert changed.name == "coco30k-dmd2[n=5000]"
    assert changed.hash != Protocol.load("coco30k-dmd2").hash


def test_different_protocols_are_refused_with_the_fields_that_differ():
    a, b = Protocol.load("coco30k-dmd2"), Protocol.load("coco30k-swiftbrush")
    with pytest.raises(UserError) as error:
        comparable(a, b)
    text = str(error.value)
    assert "preprocess: 'lanczos256-centre:truncate' and 'lanczos256-centre'" in text
    assert "seed: 10 and 0" in text
    assert "clip_model" not in text
    comparable(a, dataclasses.replace(a, name="renamed", about="again"))
    for pair in ((own(), own(seed=3)), (own(seed=3), own())):  # an open choice is not any choice
        with pytest.raises(UserError, match="differ in seed"):
            comparable(*pair)


def test_scores_with_another_clip_model_or_training_set_do_not_compare():
    one, other = own(), own(further=("CMMD: open_clip:a, 9 images",))
    with pytest.raises(UserError, match=r"further: \(\) and \('CMMD: open_clip:a, 9 images',\)"):
        comparable(one, other)
    assert Protocol.of_record(json.loads(json.dumps(other.record))) == other


def test_the_bundled_reference_is_the_one_that_the_preset_names():
    assert Protocol.load("fashion").reference_sha256 == sha256(REFERENCE)
    with pytest.raises(UserError, match=r"differ in n: 2000 and 200\.$"):
        comparable(Protocol.load("fashion"), Protocol.load("fashion-tiny"))


def test_what_the_notes_recall_is_marked_in_the_file():
    for name in ("imagenet64-edm", "imagenet256-adm", "cifar10-edm", "mjhq30k"):
        assert "preprocess" in Protocol.load(name).recalled
    assert Protocol.load("fashion").recalled == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds = 3", r"sets 'seeds'.*Did you mean 'seed'\?"),
        ('seed = "3"', "seed is '3'"),
        ("resolution = 64.0", "resolution is 64.0"),
        ('noise = "random"', "noise is 'random'"),
        ("noise_batch = 4", "noise_batch is 4 and noise is 'image'"),
        ('patch_preprocess = "bicubic"', "no preprocess 'bicubic'"),
        ('recalled = ["sigma"]', "recalled names sigma"),
        ("n = = 3", "is no TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, line, message):
    good = 'prompts = "p"\npreprocess = "clean"\nextractor = "e"\nreference = "r"\n'
    (tmp_path / "bad.toml").write_text(good + ("" if line.startswith("n =") else "n = 100\n") + line)
    with pytest.raises(UserError, match=message):
        Protocol.load(tmp_path / "bad.toml")


def test_a_protocol_without_its_needed_choices_is_refused(tmp_path):
    (tmp_path / "bad.toml").write_text('prompts = "p"\nextractor = "e"\n')
    with pytest.raises(UserError, match="leaves out n, preprocess, reference"):
        Protocol.load(tmp_path / "bad.toml")
    with pytest.raises(UserError, match="no protocol 'coco'"):
        Protocol.load("coco")


def test_presets_lie_in_the_package():
    assert FOLDER.parent.name == "eval"
    assert (FOLDER.parent / "protocol.py").is_file()


def test_a_record_is_the_protocol_again_and_an_edited_one_is_refused() -> None:
    protocol = Protocol.load("fashion").replace(n=500)
    assert Protocol.of_record(json.loads(json.dumps(protocol.record))) == dataclasses.replace(
        protocol, about="", sources=(), recalled=()
    )
    with pytest.raises(UserError, match="edited"):
        Protocol.of_record({**protocol.record, "n": 501})
