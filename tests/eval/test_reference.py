import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from fastdiff.errors import UserError
from fastdiff.eval.frechet import frechet
from fastdiff.eval.reference import Moments, read_reference, source_hash, write_reference
from fastdiff.eval.stats import Stats

ID = "inception-2015;tf1"


def stats(n: int = 60, d: int = 5, extractor: str = ID) -> Stats:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Stats.of(x @ torch.randn(d, d, generator=torch.Generator().manual_seed(1)).double() + 1, extractor=extractor)


def foreign(path, s: Stats, **more):
    np.savez(path, mu=s.mean.numpy(), sigma=s.cov().numpy(), **more)
    return path


def test_ours_keeps_everything_and_others_can_read_it(tmp_path):
    s = stats()
    write_reference(tmp_path / "ours.npz", s, source="abc", dataset="mine")
    found = read_reference(tmp_path / "ours.npz", extractor=ID)
    assert (found.stats.n, found.stats.extractor) == (60, ID)
    torch.testing.assert_close(found.stats.m2, s.m2, rtol=1e-12, atol=1e-12)
    assert {k: found.header[k] for k in ("source", "dataset", "extractor")} == {"source": "abc", "dataset": "mine", "extractor": ID}
    assert found.sqrt_sigma is not None
    torch.testing.assert_close(found.sqrt_sigma @ found.sqrt_sigma, s.cov(), rtol=1e-9, atol=1e-9)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as plain:  # as pytorch-fid, clean-fid and EDM do
        assert np.allclose(plain["sigma"], s.cov().numpy(), rtol=1e-12)
        assert plain["mu"].shape == (5,)
        assert json.loads(str(plain["header"]))["extractor"] == ID
    assert [p.name for p in tmp_path.iterdir()] == ["ours.npz"]


def test_another_resize_is_refused_unless_forced(tmp_path):
    write_reference(tmp_path / "ours.npz", stats())
    stats().save(tmp_path / "ours.safetensors")
    for name in ("ours.npz", "ours.safetensors"):
        with pytest.raises(UserError, match="'inception-2015;tf1', but the features are of 'inception-2015;clean'"):
            read_reference(tmp_path / name, extractor="inception-2015;clean")
        assert read_reference(tmp_path / name, extractor="inception-2015;clean", force=True).stats.extractor == ID
        assert read_reference(tmp_path / name).stats.n == 60


def test_a_foreign_npz_gives_the_same_distance_and_must_be_told_what_it_is(tmp_path):
    s, other = stats(), Stats.of(torch.randn(80, 5, generator=torch.Generator().manual_seed(3)), extractor=ID)
    path = foreign(tmp_path / "ttur.npz", s)
    with pytest.raises(UserError, match="does not say which network and resize"):
        read_reference(path)
    found = read_reference(path, extractor=ID).stats
    assert torch.equal(found.cov(), s.cov())
    assert frechet(other, found).value == pytest.approx(frechet(other, s).value, rel=1e-9)
    with pytest.raises(ValueError, match="different features"):
        frechet(other, read_reference(path, extractor="inception-2015;clean").stats)


def test_moments_without_a_number_of_images_do_not_merge(tmp_path):
    path = foreign(tmp_path / "edm.npz", stats())
    found = read_reference(path, extractor=ID).stats
    assert isinstance(found, Moments)
    with pytest.raises(UserError, match="without their number of images"):
        found.update(torch.randn(4, 5))
    with pytest.raises(UserError, match=r"n=\.\.\."):
        write_reference(tmp_path / "again.npz", found)
    told = read_reference(path, extractor=ID, n=60).stats
    torch.testing.assert_close(told.merge(stats()).mean, stats().mean)


def test_adm_holds_two_sets_and_the_layer_chooses(tmp_path):
    pool, spatial = stats(), stats(d=7)
    path = foreign(
        tmp_path / "adm.npz", pool, mu_s=spatial.mean.numpy(), sigma_s=spatial.cov().numpy(), arr_0=np.zeros((2, 4, 4, 3), "u1")
    )
    assert torch.equal(read_reference(path, extractor=ID).stats.cov(), pool.cov())
    assert torch.equal(read_reference(path, extractor="inception-2015/mixed_6;tf1").stats.cov(), spatial.cov())
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 4, 4, 3), "u1"))
    with pytest.raises(UserError, match=r"holds arr_0 and no mu.*features extracted first"):
        read_reference(tmp_path / "batch.npz", extractor=ID)


def test_clean_fids_features_become_statistics(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype("f4")
    np.savez(tmp_path / "set_kid.npz", feats=x)
    found = read_reference(tmp_path / "set_kid.npz", extractor="inception-2015;clean").stats
    assert found.n == 30
    assert np.allclose(found.cov().numpy(), np.cov(x, rowvar=False), rtol=1e-5)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_edm2_pickles_are_read_only_when_allowed(tmp_path, protocol):
    s, dino = stats(), stats(d=3)
    content = {"num_images": 60} | {
        key: {"mu": value.mean.numpy(), "sigma": value.cov().numpy()} for key, value in (("fid", s), ("fd_dinov2", dino))
    }
    path = tmp_path / "img64.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UserError, match="can run code"):
        read_reference(path, extractor=ID)
    found = read_reference(path, extractor=ID, allow_pickle=True).stats
    assert found.n == 60
    torch.testing.assert_close(found.cov(), s.cov(), rtol=1e-12, atol=1e-12)
    assert len(read_reference(path, extractor="dinov2-vitl14#0;torch-bicubic", allow_pickle=True).stats.mean) == 3


def test_the_unpickler_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for content in ({"fid": Attack()}, np.array([Attack()], dtype=object), torch.nn.Linear(1, 1)):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="which feature statistics do not need"):
            read_reference(tmp_path / "bad.pkl", extractor=ID, allow_pickle=True)
    assert not (tmp_path / "owned").exists()


def test_an_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="no npz of arrays"):
        read_reference(tmp_path / "bad.npz", extractor=ID)


def test_moments_that_cannot_be_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "b.npz", mu=np.zeros(2), sigma=np.array([[1, 2], [0, 1.0]]))
    np.savez(tmp_path / "c.npz", mu=np.array([0, np.nan]), sigma=np.eye(2))
    for name, message in (("a", "no finite moments"), ("b", "not symmetric"), ("c", "no finite moments"), ("d", "no reference")):
        with pytest.raises(UserError, match=message):
            read_reference(tmp_path / f"{name}.npz", extractor=ID)


def test_a_changed_folder_of_the_same_name_is_another_source(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"123")
    files = [tmp_path / "b.png", tmp_path / "a.png"]
    before = source_hash(files, tmp_path)
    one = hashlib.sha256(b"123").hexdigest()
    assert before == hashlib.sha256(f"{one}  a.png\n{one}  b.png\n".encode()).hexdigest()
    assert source_hash(reversed(files), tmp_path) == before
    (tmp_path / "a.png").write_bytes(b"124")  # of equal size
    assert source_hash(files, tmp_path) != before
    (tmp_path / "a.png").write_bytes(b"123")
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert source_hash([tmp_path / "a.png", tmp_path / "c.png"], tmp_path) != before
