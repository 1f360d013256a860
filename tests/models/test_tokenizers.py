"""Tokenizer files for transformers 4 and 5."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from fastdiff.data.fashion import captions, save_tokenizer, tokenizer
from fastdiff.models.tokenizers import add_slow_files


def test_the_added_files_describe_the_same_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    header, *merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert header.startswith("#version")  # transformers 4 skips the first line
    rebuilt = CLIPTokenizer(vocab=vocab, merges=[tuple(m.split()) for m in merges], model_max_length=16)
    texts = [*captions()[::37], "", "a tartan boot, 50% off"]
    want = tokenizer()(texts, padding="max_length").input_ids
    assert rebuilt(texts, padding="max_length").input_ids == want
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts, padding="max_length").input_ids == want


def test_existing_files_and_other_models_are_left_alone(tmp_path: Path) -> None:
    add_slow_files(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {}}}))
    add_slow_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    save_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    add_slow_files(tmp_path)
    assert (tmp_path / "vocab.json").read_text() == "{}"
