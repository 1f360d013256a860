"""Reference statistics of other evaluators, and our own in the file they read.

| file | holds | extractor |
|---|---|---|
| TTUR, pytorch-fid, clean-fid, EDM npz | ``mu`` [d], ``sigma`` [d, d] | must be stated |
| ADM npz | also ``mu_s``, ``sigma_s`` of mixed_6 (2023 features) | must be stated; ``.../mixed_6;...`` reads the latter |
| clean-fid ``*_kid.npz`` | ``feats`` [n, d] | must be stated |
| EDM2 pkl | ``num_images``, ``fid`` and ``fd_dinov2`` with mu and sigma | must be stated; only with ``allow_pickle=True`` |
| ours | mu, sigma, n, ddof, sqrt_sigma and a JSON header | checked |

A foreign file does not say which network, resize and filter it came from: the caller does, as an extractor's ``id``
(``"inception-2015;tf1"``), and a distance to features of another id is refused. ``sqrt_sigma`` is the root that every distance
to this reference needs again.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fastdiff._version import __version__
from fastdiff.errors import UserError
from fastdiff.eval.frechet import covariance_root
from fastdiff.eval.stats import Stats
from fastdiff.eval.weights import sha256
from fastdiff.files import aside

FORMAT = "fastdiff-reference-1"


@dataclass(frozen=True, eq=False)
class Moments(Stats):
    """Statistics whose n is not known: ``cov()`` is the file's sigma to the bit, and they merge with nothing."""

    def merge(self, other: Stats) -> Stats:
        """Always a ``UserError``: the weights of the two sets would be made up."""
        raise UserError(f"statistics of {self.extractor!r} came without their number of images and cannot be merged.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Statistics to measure against, the root of their covariance when the file has it, and what the file says of itself."""

    stats: Stats
    sqrt_sigma: Tensor | None = None
    header: dict[str, Any] = field(default_factory=dict)


def read_reference(
    path: str | Path, *, extractor: str = "", allow_pickle: bool = False, force: bool = False, n: int | None = None
) -> Reference:
    """Reference statistics from any file of the table.

    Args:
        extractor: the ``id`` of the extractor that the features to compare come from.
        allow_pickle: read EDM2's pickle, by an unpickler that builds arrays and nothing else.
        force: take our own file although its header names another extractor or preprocess.
        n: the number of images, for a foreign file that does not say.

    Raises:
        UserError: the file is of another extractor, says nothing of it while ``extractor`` is empty, or holds no statistics.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no reference statistics at {file}.")
    if file.suffix in (".pkl", ".pickle"):
        return _stated(_pickle(file, extractor, allow_pickle), file, extractor, n)
    if file.suffix == ".safetensors":
        stats = Stats.load(file)
        _check(stats.extractor, extractor, file, force)
        return Reference(stats=stats, header={"extractor": stats.extractor})
    try:
        with np.load(file, allow_pickle=False) as found:
            return _npz(found, file, extractor, force, n)
    except (BadZipFile, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no npz of arrays: {error}") from error


def write_reference(path: str | Path, stats: Stats, *, source: str = "", **facts: Any) -> None:
    """Write ``stats`` as an npz that pytorch-fid, clean-fid and EDM read too, with the covariance's root and a JSON header.

    Args:
        source: ``source_hash`` of the images.
        facts: further entries of the header, such as the data set's name.
    """
    if isinstance(stats, Moments):
        raise UserError("these statistics came without their number of images: read the file again with n=...")
    header = {**facts, "format": FORMAT, "extractor": stats.extractor, "source": source, "fastdiff": __version__}
    arrays = {"mu": stats.mean.numpy(), "sigma": stats.cov().numpy(), "sqrt_sigma": covariance_root(stats).numpy()}
    with aside(Path(path).with_suffix(".npz")) as part:
        np.savez(part, n=stats.n, ddof=1, header=np.array(json.dumps(header)), allow_pickle=False, **arrays)


def source_hash(files: Iterable[str | Path], root: str | Path) -> str:
    """SHA-256 of the bytes of ``files`` and of their names below ``root``: one changed pixel is another source.

    The digest of the sorted lines ``<SHA-256 of the file>  <name>``, as ``sha256sum`` prints them, in the order of the names. Every
    file is read once, a block at a time.
    """
    names = sorted(Path(file).relative_to(root).as_posix() for file in files)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{sha256(Path(root) / name)}  {name}\n".encode())
    return digest.hexdigest()


def _npz(found: Any, file: Path, extractor: str, force: bool, n: int | None) -> Reference:
    keys = set(found.keys())
    if "header" in keys:
        header = json.loads(str(found["header"]))
        _check(header["extractor"], extractor, file, force)
        stats = _moments(found["mu"], found["sigma"], int(found["n"]), header["extractor"], ddof=int(found["ddof"]))
        return Reference(stats=stats, sqrt_sigma=torch.from_numpy(found["sqrt_sigma"]), header=header)
    spatial = "_s" if "/mixed_6" in extractor else ""
    if {f"mu{spatial}", f"sigma{spatial}"} <= keys:
        return _stated((found[f"mu{spatial}"], found[f"sigma{spatial}"], n), file, extractor, n)
    if "feats" in keys:
        return Reference(stats=Stats.of(torch.from_numpy(found["feats"]), extractor=_given(extractor, file)))
    wanted = "mu_s and sigma_s of mixed_6" if spatial else "mu and sigma"
    raise UserError(f"{file} holds {', '.join(sorted(keys))} and no {wanted}: a batch of images has its features extracted first.")


def _stated(moments: tuple[Any, Any, int | None], file: Path, extractor: str, n: int | None) -> Reference:
    mu, sigma, stored = moments
    return Reference(stats=_moments(mu, sigma, n or stored, _given(extractor, file)), header={"file": file.name})


def _moments(mu: Any, sigma: Any, n: int | None, extractor: str, *, ddof: int = 1) -> Stats:
    mean, cov = torch.from_numpy(np.array(mu, dtype=np.float64)), torch.from_numpy(np.array(sigma, dtype=np.float64))
    if mean.ndim != 1 or cov.shape != (len(mean),) * 2 or not (mean.isfinite().all() and cov.isfinite().all()):
        raise UserError(f"mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are no finite moments: expected [d] and [d, d].")
    if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * cov.diagonal().abs().max().item()):
        raise UserError("sigma is not symmetric: the file holds something else, such as a root or a product of covariances.")
    if n is None:
        return Moments(2, mean, cov, extractor)  # n = 2: m2 / (n - 1) is sigma itself
    return Stats(n, mean, cov * (n - ddof), extractor)


def _given(extractor: str, file: Path) -> str:
    if not extractor:
        raise UserError(f"{file} does not say which network and resize it is of: pass extractor='inception-2015;tf1' or the like.")
    return extractor


def _check(stored: str, wanted: str, file: Path, force: bool) -> None:
    if wanted and stored != wanted and not force:
        raise UserError(
            f"{file} is of {stored!r}, but the features are of {wanted!r}: another network or another resize. Extract both "
            "with one, or pass force=True for a number that compares with nothing."
        )


def _pickle(file: Path, extractor: str, allowed: bool) -> tuple[Any, Any, int | None]:
    if not allowed:
        raise UserError(
            f"{file} is a pickle, which can run code when it is read: pass allow_pickle=True if you know where it is from."
        )
    found = _Arrays(io.BytesIO(file.read_bytes())).load()
    key = "fd_dinov2" if "dinov2" in extractor else "fid"
    try:
        return found[key]["mu"], found[key]["sigma"], int(found["num_images"])
    except (KeyError, TypeError) as error:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{file} has no statistics {key!r} for {extractor!r}: it holds {keys}.") from error


class _Arrays(pickle.Unpickler):
    """Builds numpy arrays and Python's own containers; every other global is refused before it is imported."""

    _names = (
        *((f"{core}.multiarray", name) for core in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
        *((f"{core}.numeric", "_frombuffer") for core in ("numpy.core", "numpy._core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise UserError(f"the pickle asks for {module}.{name}, which feature statistics do not need: it is refused.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
