"""Tokenizer files that both transformers 4 and 5 read."""

import json
from pathlib import Path


def add_slow_files(folder: str | Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` from ``tokenizer.json``: transformers 5 saves only that, transformers 4 needs them.

    Nothing happens where there is no BPE ``tokenizer.json`` or where the files exist.
    """
    saved, vocab = Path(folder, "tokenizer.json"), Path(folder, "vocab.json")
    if not saved.exists() or vocab.exists():
        return
    model = json.loads(saved.read_text(encoding="utf-8"))["model"]
    if model.get("type") != "BPE":
        return
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocab.write_text(json.dumps(model["vocab"]), encoding="utf-8")
    Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
