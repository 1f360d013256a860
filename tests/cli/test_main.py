"""The front door: help that answers at once, and mistakes that end in one line and exit code 2."""

import errno
import importlib
import os
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from fastdiff._version import __version__
from fastdiff.cli import methods as methods_command
from fastdiff.cli.main import COMMANDS, main
from fastdiff.errors import UserError


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["sample", "--help"], ["eval", "--help"]])
def test_help_and_methods_import_no_torch_and_answer_in_a_second(words):
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "fastdiff.cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1:
            break
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastdiff.cli.options" in imported
    assert not imported & {"torch", "numpy", "diffusers", "transformers"}
    assert min(seconds) < 1


def test_help_lists_every_command_and_every_command_exists(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in shown
        module = {"eval": "evaluate"}.get(name, name).replace("-", "_")
        assert callable(importlib.import_module(f"fastdiff.cli.{module}").run)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdiff {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["distil"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    known = "distill, distill-multi, plan, sample, eval, certify, methods"
    assert err == f"fastdiff: no command 'distil', did you mean 'distill'? Commands: {known}.\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("two\n  lines"), "two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/grid.png"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("Error while deserializing header: incomplete metadata"), "damaged or cut off"),
    ],
)
def test_what_a_user_can_repair_is_one_line_and_exit_code_2(monkeypatch, capsys, error, expected):
    def run(argv):
        raise error

    monkeypatch.setattr(methods_command, "run", run)
    assert main(["methods"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert expected in err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def run(argv):
        raise KeyError("not the user's fault")

    monkeypatch.setattr(methods_command, "run", run)
    with pytest.raises(KeyError):
        main(["methods"])


def test_ctrl_c_ends_in_130(monkeypatch, capsys):
    def run(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods_command, "run", run)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "\nfastdiff: stopped\n"
