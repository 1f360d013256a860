"""Write several one-step students as one folder whose pipeline routes each prompt: see ``pipelines.multi_student``."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError
from fastdiff.pipelines.export import replace

SOURCE = Path(__file__).with_name("multi_student.py")
_ASKED = ("sample_size", "in_channels", "time_cond_proj_dim")

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
{students} one-step students of `{teacher}`, each for a part of the prompts, made with fastdiff {version}.

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)   # runs multi_student.py of this folder
pipeline("{prompt}").images[0]
pipeline.touched()          # parameters that had a part in it
pipeline.keep(1)            # at most one student in memory
```

One network call per image, no guidance. A student is read from `students/` when one of its prompts first comes.
"""


def export_students(
    students: Sequence[Path], folder: Path, *, note: Mapping[str, Any], prompt: str, save_partition: Callable[[Path], None]
) -> None:
    """Put exported one-step folders, whose other components are the same, into one folder with the routing pipeline.

    Written aside and moved into ``folder`` part by part, ``model_index.json`` last. ``note`` goes to ``fastdiff.json``.

    Raises:
        UserError: the students' images are of different sizes, or the folder cannot be written.
    """
    from fastdiff._version import __version__

    configs = [json.loads((path / "unet" / "config.json").read_text(encoding="utf-8")) for path in students]
    asked = [{key: config[key] for key in _ASKED} for config in configs]
    if any(other != asked[0] for other in asked):
        raise UserError(f"the students take different latents ({asked}): one pipeline could not draw noise for all of them.")
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        index = json.loads((students[0] / "model_index.json").read_text(encoding="utf-8"))
        shared = [name for name in index if name != "unet" and (students[0] / name).is_dir()]
        for name in shared:
            shutil.copytree(students[0] / name, aside / name)
        for k, path in enumerate(students):
            shutil.copytree(path / "unet", aside / "students" / str(k) / "unet")
        save_partition(aside)
        del index["unet"]
        index["_class_name"] = [SOURCE.stem, "MultiStudentPipeline"]
        index["parameters"] = [_parameters(path / "unet") for path in students]
        index["network"] = {**asked[0], "identity": _hash(aside)}
        shutil.copyfile(SOURCE, aside / SOURCE.name)
        card = _CARD.format(students=len(students), teacher=note["teacher"], version=__version__, prompt=prompt)
        (aside / "README.md").write_text(card, encoding="utf-8")
        (aside / "fastdiff.json").write_text(json.dumps(dict(note), indent=2) + "\n", encoding="utf-8")
        (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in sorted(aside.iterdir(), key=lambda path: path.name == "model_index.json"):
            replace(part, folder / part.name)
    except OSError as error:
        raise UserError(
            f"cannot write the students to {folder}: {error}. Free space; the runs of the students are kept."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _parameters(folder: Path) -> int:
    """Parameters in the safetensors files of a network, by their headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - it is no mapping
    return total


def _hash(folder: Path) -> str:
    """SHA-256 of the students' files and the partition."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("students/*/unet/*"), *folder.glob("partition.*")]):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
