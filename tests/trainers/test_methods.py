"""Every method brings its paper, its documented fields, its program, its tests and its page."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import fastdiff.trainers
from fastdiff.errors import UserError
from fastdiff.trainers.method import Method

ROOT = Path(__file__).parents[2]
METHODS = [getattr(fastdiff.trainers, name) for name in fastdiff.trainers.__all__]
IDS = [method.name() for method in METHODS]


def concrete(cls: type) -> set[type]:
    found = set() if inspect.isabstract(cls) or not hasattr(cls, "info") else {cls}
    return found.union(*(concrete(child) for child in cls.__subclasses__()))


def test_every_method_file_is_listed() -> None:
    for path in (ROOT / "fastdiff" / "trainers").glob("*.py"):
        importlib.import_module(f"fastdiff.trainers.{path.stem}" if path.stem != "__init__" else "fastdiff.trainers")
    here = {cls for cls in concrete(Method) if cls.__module__.startswith("fastdiff.trainers.")}
    assert here == set(METHODS)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_paper_is_complete(method: type[Method]) -> None:
    for field in dataclasses.fields(method.info):
        assert getattr(method.info, field.name), field.name
    assert method.__doc__
    assert method.info.arxiv in (inspect.getmodule(method).__doc__ or "")


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_field_has_help(method: type[Method]) -> None:
    documented: set[str] = set()
    for cls in method.__mro__:
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                documented.add(field.target.id)  # type: ignore[union-attr]
    assert {field.name for field in dataclasses.fields(method)} <= documented


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_companions_exist(method: type[Method]) -> None:
    stem = method.__module__.rsplit(".", 1)[1]
    assert (ROOT / "trainers" / f"{stem}.py").exists()
    assert (ROOT / "tests" / "trainers" / f"test_{stem}.py").exists()
    page = ROOT / "docs" / "methods" / f"{method.name()}.md"
    assert page.exists()
    assert "| paper | ours | baseline |" in page.read_text()
    assert f"(methods/{method.name()}.md)" in (ROOT / "docs" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ODEPairs", {"pair_solver": "rk45"}),
        ("ODEPairs", {"pairs": 0}),
        ("ODEPairs", {"pair_steps": 0}),
        ("ODEPairs", {"huber_c": 0.0}),
        ("DMD2", {"gan_weight": -1.0}),
        ("DMD2", {"pairs": 0}),
        ("SwiftBrush", {"null_probability": 3.0}),
        ("SwiftBrush", {"warm_start_steps": -1}),
        ("ProlificDreamer", {"particles": 0}),
    ],
)
def test_values_that_cannot_work_are_refused(method: str, fields: dict[str, float | str]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        getattr(fastdiff.trainers, method)(**fields)
