"""The programs in ``eval/``, ``trainers/`` and ``pipelines/``: what ``--help`` says of them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(path for folder in ("eval", "trainers", "pipelines") for path in (ROOT / folder).glob("*.py"))


def command_lines(path: Path) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "tyro.cli"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_hands_its_docstring_to_its_help(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
    calls = command_lines(path)
    assert len(calls) <= 1
    for call in calls:
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("description") == "__doc__"


def test_help_begins_with_the_docstring() -> None:
    path = ROOT / "eval" / "pairs.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert (ast.get_docstring(ast.parse(path.read_text())) or "?").splitlines()[0] in done.stdout


def test_the_readme_s_own_network_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [text for text in blocks if "Teacher.from_module" in text]
    assert len(block.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), found)
    assert (tmp_path / "runs" / "own" / "student.safetensors").is_file()
