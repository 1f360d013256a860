import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.eval.weights import WeightFile, find_folder, sha256, state_digest


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for FASTDIFF_WEIGHTS and torch's cache."""
    ours, cache = tmp_path / "ours", tmp_path / "hub" / "checkpoints"
    ours.mkdir()
    cache.mkdir(parents=True)
    monkeypatch.setenv("FASTDIFF_WEIGHTS", str(ours))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return ours, cache


def published(content: bytes, tmp_path, **options) -> WeightFile:
    (tmp_path / "original").write_bytes(content)
    digest = sha256(tmp_path / "original")
    return WeightFile(
        names=("net.pth", "alias.pth"), url="https://example.org/net.pth", size="4 bytes", sha256=(digest,), **options
    )


def test_the_explicit_path_comes_before_the_folder_and_the_folder_before_the_cache(places, tmp_path):
    ours, cache = places
    file = published(b"good", tmp_path)
    (cache / "net.pth").write_bytes(b"good")
    assert file.find() == (cache / "net.pth", True)
    (ours / "alias.pth").write_bytes(b"good")
    assert file.find() == (ours / "alias.pth", True)
    assert file.find(tmp_path / "original") == (tmp_path / "original", True)


def test_an_explicit_path_that_is_missing_is_not_replaced_by_a_cached_file(places, tmp_path):
    (places[1] / "net.pth").write_bytes(b"good")
    with pytest.raises(UserError, match=r"Looked for: .*typo\.pth\."):
        published(b"good", tmp_path).find(tmp_path / "typo.pth", allow_download=True)


def test_the_message_says_what_where_and_whence(places, tmp_path):
    file = published(b"good", tmp_path)
    with pytest.raises(UserError) as error:
        file.find()
    text = str(error.value)
    for part in (
        "net.pth",
        "4 bytes",
        file.sha256[0],
        str(places[0]),
        str(places[1]),
        file.url,
        "FASTDIFF_WEIGHTS",
        "allow_download",
    ):
        assert part in text
    assert "\n" not in text


def test_a_truncated_file_is_refused_wherever_it_lies(places, tmp_path):
    file = published(b"good", tmp_path)
    (places[0] / "net.pth").write_bytes(b"goo")
    for path, verify in ((None, True), (None, False), (places[0], True)):
        with pytest.raises(UserError, match="truncated or another network"):
            file.find(path, verify=verify)
    assert file.find(places[0], verify=False) == (places[0] / "net.pth", False)


def test_nothing_is_downloaded_unless_asked_and_a_broken_download_leaves_nothing(places, tmp_path, monkeypatch):
    file, calls = published(b"good", tmp_path), []

    def download(url: str, path: str) -> None:
        calls.append(url)
        with open(path, "wb") as out:
            out.write(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError):
        file.find()
    assert calls == []
    content = b"half"
    with pytest.raises(UserError, match="truncated"):
        file.find(allow_download=True)
    assert list(places[1].iterdir()) == []
    content = b"good"
    assert file.find(allow_download=True) == (places[1] / "net.pth", True)
    assert file.find() == (places[1] / "net.pth", True)


def test_a_model_folder_is_found_or_asked_for(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (places[0] / "clip-tiny").mkdir()
    assert find_folder("someone/clip-tiny") == places[0] / "clip-tiny"
    with pytest.raises(UserError, match=r"someone/absent.*the Hugging Face cache.*huggingface\.co/someone/absent"):
        find_folder("someone/absent")
    with pytest.raises(UserError, match="Looked for"):
        find_folder("someone/clip-tiny", tmp_path / "no")


def test_the_digest_is_of_every_weight():
    a = torch.nn.Linear(2, 2)
    before = state_digest(a)
    with torch.no_grad():
        a.bias[1] += 1e-6
    assert state_digest(a) != before
