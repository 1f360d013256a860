"""Every choice that a score depends on, in one TOML file; its hash stands behind the score.

    FID[lanczos256-centre:truncate]-30k#5b0c3d1a = 8.41 +- 0.06

The hash is the first eight hex digits of the SHA-256 of the choices' canonical JSON: keys sorted, no spaces, numbers in the
field's type. ``name``, ``about``, ``sources`` and ``recalled`` are commentary and do not enter it, nor does an empty
``further``. Two scores with different hashes are scores of different things, and ``comparable`` says in which fields. An empty
value leaves the choice open: it is then a column of the result (``steps`` and ``guidance_scale`` differ between a teacher and
its student by design).
"""

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.eval.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "protocols"
COMMENTARY = ("name", "about", "sources", "recalled")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images are generated, prepared and scored.

    >>> protocol = Protocol.load("fashion")
    >>> protocol.label("FD[fashion]")                       # 'FD[fashion]-2k#...'
    >>> protocol.replace(n=500).name                        # 'fashion[n=500]'
    """

    name: str
    about: str = ""
    sources: tuple[str, ...] = ()
    """Where the choices were read."""
    recalled: tuple[str, ...] = ()
    """Fields that nobody has read in a source yet: check them before a score is quoted."""

    n: int
    """Generated images."""
    prompts: str
    """What the images are asked for: a list of captions, or classes."""
    prompts_sha256: str = ""
    """Of the file, or of the captions joined by newlines: lists of one name differ between papers."""
    seed: int | None = None
    noise: str = "image"
    """What draws an image's noise: ``image`` a generator each, ``batch`` one a batch, ``stream`` one for all.

    Images drawn here are ``image``; the others describe published protocols."""
    noise_batch: int | None = None
    """The batch size that is part of the noise where that is not ``image``; with ``image`` it changes nothing and is refused."""
    resolution: int | None = None
    """Side of the generated images in pixels."""
    output_range: str = "[0, 1]"
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str = ""
    """A class of diffusers in the place of the saved one; of all pipelines but students, as ``steps`` and ``guidance_scale``."""

    preprocess: str
    """``Preprocess.id``: crop, resize and rounding of the generated images."""
    reference_preprocess: str = ""
    """Of the reference images, where it is another."""
    patch_preprocess: str = ""
    """Of a second Frechet distance of full-resolution patches."""
    extractor: str
    layer: str = "pool"
    ddof: int = 1
    reference: str
    reference_sha256: str = ""

    clip_model: str = ""
    clip_prefix: str = ""
    clip_scale: float | None = None
    clip_clamp: str = ""
    inception_splits: str = ""
    """How the Inception score is split, such as ``10 splits`` or ``splits of 5000``."""
    neighbours: int | None = None
    """k of precision and recall."""
    further: tuple[str, ...] = ()
    """What scores beside the feature pass were measured with (sFID, CMMD, copies of training images): filled in when they are."""

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _typed(item, getattr(self, item.name)))
        for text in (self.preprocess, self.reference_preprocess, self.patch_preprocess):
            if text:
                Preprocess.parse(text)
        if self.n < 2:
            raise UserError(f"n is {self.n}: a covariance needs 2 images or more.")
        if self.clip_clamp not in ("", "per_sample", "mean", "none"):
            raise UserError(f"clip_clamp is {self.clip_clamp!r}: expected 'per_sample', 'mean' or 'none'.")
        if self.noise not in ("image", "batch", "stream"):
            raise UserError(f"noise is {self.noise!r}: expected 'image', 'batch' or 'stream'.")
        if self.noise == "image" and self.noise_batch is not None:
            raise UserError(
                f"noise_batch is {self.noise_batch} and noise is 'image', which no batch changes: it would make equal scores "
                "incomparable. Leave noise_batch out, or set noise to 'batch' or 'stream'."
            )
        if unknown := set(self.recalled) - {item.name for item in fields(self)}:
            raise UserError(f"recalled names {', '.join(sorted(unknown))}, which a protocol has not.")

    @classmethod
    def load(cls, name: str | Path) -> "Protocol":
        """A bundled protocol by its name, or one from a TOML file; ``UserError`` for keys that a protocol has not."""
        path = FOLDER / f"{name}.toml" if str(name) in presets() else Path(name)
        if not path.is_file():
            raise UserError(f"no protocol {str(name)!r}: expected a TOML file or one of {', '.join(presets())}.")
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is no TOML: {error}") from error
        return cls._of({"name": path.stem, **found}, str(path))

    @classmethod
    def _of(cls, values: dict[str, Any], where: str) -> "Protocol":
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(known)}."
                raise UserError(f"{where} sets {key!r}, which a protocol has not: it would have been ignored.{hint}")
        needed = [item.name for item in fields(cls) if item.default is dataclasses.MISSING and item.name not in values]
        if needed:
            raise UserError(f"{where} leaves out {', '.join(needed)}: a score without them cannot be compared.")
        return cls(**values)

    @property
    def choices(self) -> dict[str, Any]:
        """All fields but the commentary, and ``further`` only where there is any."""
        named = [item.name for item in fields(self) if item.name not in COMMENTARY]
        return {name: getattr(self, name) for name in named if name != "further" or self.further}

    @property
    def canonical(self) -> str:
        """The choices as JSON that depends on nothing else."""
        return json.dumps(self.choices, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @property
    def hash(self) -> str:
        """Eight hex digits of the choices."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:8]

    @property
    def record(self) -> dict[str, Any]:
        """What stands in a result file: name, hash and all choices."""
        return {"name": self.name, "hash": self.hash, **self.choices}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Protocol":
        """The protocol that a result file was made under; ``UserError`` when its choices are not those of its hash."""
        protocol = cls._of({key: value for key, value in record.items() if key != "hash"}, "the protocol of a result")
        if protocol.hash != record.get("hash"):
            raise UserError(
                f"the protocol {protocol.name} says {record.get('hash')} and has the hash {protocol.hash}: it was edited."
            )
        return protocol

    def label(self, score: str) -> str:
        """``score`` with the number of images and the hash: ``FD[fashion]-2k#3fa91c2e``."""
        n = f"{self.n // 1000}k" if self.n % 1000 == 0 else str(self.n)
        return f"{score}-{n}#{self.hash}"

    def replace(self, **changes: Any) -> "Protocol":
        """This protocol with other choices; those that differ are printed in its name."""
        if changed := {k: v for k, v in changes.items() if getattr(self, k, None) != v and k not in COMMENTARY}:
            changes = {"name": f"{self.name}[{', '.join(f'{k}={v}' for k, v in changed.items())}]", **changes}
        return type(self)._of({**{item.name: getattr(self, item.name) for item in fields(self)}, **changes}, "replace(...)")


def presets() -> list[str]:
    """Names of the bundled protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def comparable(a: Protocol, b: Protocol) -> None:
    """``UserError`` that names every differing choice, unless scores of ``a`` and ``b`` may stand in one table."""
    ours, theirs = {"further": (), **a.choices}, {"further": (), **b.choices}
    differ = [f"{key}: {value!r} and {theirs[key]!r}" for key, value in ours.items() if value != theirs[key]]
    if differ:
        raise UserError(
            f"{a.name}#{a.hash} and {b.name}#{b.hash} are different protocols, and their scores do not compare. "
            f"They differ in {'; '.join(differ)}."
        )


def _typed(item: "dataclasses.Field[Any]", value: Any) -> Any:
    """``value`` in the field's type, so that 3 and 3.0 hash alike; ``UserError`` when it is of another."""
    kind = str(item.type)
    if value is None and "None" in kind:
        return None
    if "tuple" in kind and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind.startswith(("float", "<class 'float'>")) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if ("int" in kind and type(value) is int) or ("str" in kind and "tuple" not in kind and isinstance(value, str)):
        return value
    raise UserError(f"{item.name} is {value!r}: expected {getattr(item.type, '__name__', kind)}.")
