"""A tiny Stable Diffusion folder that is not of the bundled world: its tokenizer knows a zebra."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pipeline."""
    from tiny import tiny_pipeline

    pipeline = tiny_pipeline()
    pipeline.tokenizer.add_tokens(["zebra"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    folder = tmp_path_factory.mktemp("stranger") / "zoo"
    pipeline.save_pretrained(folder)
    return folder
