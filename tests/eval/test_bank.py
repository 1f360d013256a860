import json

import numpy as np
import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.eval.bank import FeatureBank, assemble, extract, missing, write_shard
from fastdiff.eval.stats import Stats
from fastdiff.eval.weightless import pixel_pca


def features(n: int = 500, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 10


def write(folder, x, cuts, *, order=None, **options):
    parts = list(torch.arange(len(x)).tensor_split(cuts))
    for i in order or range(len(parts)):
        ids = parts[i]
        write_shard(folder, ids, x[ids], extractor="x;clean", columns={"class": ids % 3}, **options)


def test_seven_uneven_shards_in_any_order_are_one_pass(tmp_path):
    x = features()
    write(tmp_path, x, [1, 2, 90, 91, 260, 300], order=(3, 0, 6, 1, 5, 2, 4))
    bank = assemble(tmp_path, n=500)
    assert isinstance(bank.features, np.memmap)
    assert torch.equal(torch.from_numpy(np.array(bank.features)), x)
    assert torch.equal(bank.ids, torch.arange(500))
    streamed = Stats.of(x[:64], extractor="x;clean")
    for part in x[64:].split(64):
        streamed = streamed.update(part)
    for stats in (bank.stats(), Stats.of(x, extractor="x;clean")):
        assert (stats.n, stats.extractor) == (500, "x;clean")
        torch.testing.assert_close(stats.mean, streamed.mean, rtol=1e-10, atol=0)
        torch.testing.assert_close(stats.m2, streamed.m2, rtol=1e-10, atol=1e-10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.json", "class.npy", "features.npy", "ids.npy"]


def test_rows_of_a_class_are_its_images(tmp_path):
    x = features(50)
    write(tmp_path, x, [20])
    bank = assemble(tmp_path)
    rows = bank.rows("class", 2)
    assert torch.equal(torch.from_numpy(bank.features[rows]), x[2::3])
    torch.testing.assert_close(bank.stats(rows).mean, x[2::3].double().mean(0))
    with pytest.raises(UserError, match="no column 'prompt': it has class"):
        bank.rows("prompt", 0)


def test_a_padded_last_batch_counts_once(tmp_path):
    x = features(10)
    for ids in (torch.tensor([0, 2, 4, 6, 8, 8]), torch.tensor([1, 3, 5, 7, 9, 0])):
        write_shard(tmp_path, ids, x[ids], extractor="x", columns={"class": 100 + ids})
    bank = assemble(tmp_path, n=10)
    assert np.array_equal(bank.features, x.numpy())
    assert bank.ids.tolist() == list(range(10))
    assert bank.columns["class"].tolist() == list(range(100, 110))


def test_shards_that_were_numbered_from_zero_each_lose_no_image_in_silence(tmp_path):
    x = features(20)
    write_shard(tmp_path, torch.arange(10), x[:10], extractor="x")
    write_shard(tmp_path, torch.arange(8), x[10:18], extractor="x")
    with pytest.raises(UserError, match="number images over all shards"):
        assemble(tmp_path)


def test_float16_halves_the_file_and_rounds_once(tmp_path):
    x = features()
    write(tmp_path, x, [200], dtype="float16")
    bank = assemble(tmp_path)
    assert bank.features.dtype == np.float16
    torch.testing.assert_close(bank.stats().m2, Stats.of(x.half(), extractor="x").m2, rtol=1e-10, atol=1e-10)
    with pytest.raises(UserError, match="1 of 3 feature rows are not finite in float16"):
        write_shard(tmp_path, torch.arange(3), torch.tensor([[1.0], [1e6], [1.0]]), extractor="x", dtype="float16")


def test_shards_of_two_extractors_are_not_merged(tmp_path):
    write_shard(tmp_path, torch.arange(3), features(3), extractor="x;clean")
    write_shard(tmp_path, torch.arange(3, 6), features(3), extractor="x;tf1")
    with pytest.raises(UserError, match="differ in extractor: 'x;clean' and 'x;tf1'"):
        assemble(tmp_path)


class Source:
    """Images by id, which remembers what it was asked for and stops where it is told."""

    def __init__(self, n: int, stop: int = 10**9) -> None:
        self.images = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.asked: list[int] = []
        self.stop = stop

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if len(self.asked) >= self.stop:
            raise KeyboardInterrupt
        self.asked += ids.tolist()
        return self.images[ids]


def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path):
    extractor, n = pixel_pca(5, side=16), 37
    broken, resumed = Source(n, stop=16), Source(n)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, extractor, broken, n, shard_size=8)
    with pytest.raises(UserError, match="16 of 37 images"):
        assemble(tmp_path, n=n)
    extract(tmp_path, extractor, resumed, n, shard_size=8)
    assert resumed.asked == list(range(16, 37))
    bank = assemble(tmp_path, n=n)
    torch.testing.assert_close(torch.from_numpy(np.array(bank.features)), extractor(resumed.images), rtol=1e-5, atol=1e-6)
    assert len(missing(tmp_path, n)) == 0
    assert missing(tmp_path, 40).tolist() == [37, 38, 39]


def test_processes_that_start_late_take_their_own_shards(tmp_path):
    """One after the other in one folder: the last sees what the first has written, and must not shift its share."""
    extractor, n = pixel_pca(5, side=16), 29
    sources = [Source(n) for _ in range(3)]
    for rank in (2, 0, 1):
        extract(tmp_path / "many", extractor, sources[rank], n, shard_size=4, rank=rank, world_size=3)
    assert sorted(i for source in sources for i in source.asked) == list(range(n))
    extract(tmp_path / "one", extractor, Source(n), n)
    many, one = assemble(tmp_path / "many", n=n), assemble(tmp_path / "one", n=n)
    torch.testing.assert_close(many.stats().m2, one.stats().m2, rtol=1e-6, atol=1e-9)


def test_damage_is_noticed(tmp_path):
    with pytest.raises(UserError, match=r"no bank\.json and 0 shards"):
        FeatureBank.open(tmp_path)
    write(tmp_path, features(10), [5])
    assemble(tmp_path)
    header = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**header, "n": 11}))
    with pytest.raises(UserError, match="assemble it again"):
        FeatureBank.open(tmp_path)
    with pytest.raises(UserError, match="n values each"):
        write_shard(tmp_path, torch.arange(3), features(4), extractor="x")
