"""``fastdiff certify``: choice of methods and laws, table, JSON, exit codes; the certificates themselves are in tests/proof."""

import json
from pathlib import Path

import pytest

from fastdiff.cli.main import main
from fastdiff.cli.methods import methods
from fastdiff.errors import UserError
from fastdiff.proof import certify as proof
from fastdiff.proof.certify import Row


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The certificates that are run, each answered with one row: 0.1 on the ring and 0.9 elsewhere, bound 0.5."""
    calls: list[tuple[str, str, int]] = []

    def answer(method: type, law: str, *, seed: int) -> list[Row]:
        calls.append((method.name(), law, seed))
        value = 0.1 if law == "ring" else 0.9
        return [Row(method.name(), law, "mode_mass", value, 0.5, 1.0, 0.05, 1.0, seed, {"masses": [0.75, 0.25]})]

    monkeypatch.setattr(proof, "certify", answer)
    return calls


def test_all_methods_on_all_their_laws_without_arguments(asked: list[tuple[str, str, int]]) -> None:
    assert main(["certify"]) == 1
    assert {method for method, *_ in asked} == set(methods())
    assert {("dmd2", "ring", 0), ("swiftbrush", "gaussian", 0)} <= set(asked)


def test_chosen_methods_laws_and_seeds(
    asked: list[tuple[str, str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert main(["certify", "dmd2", "--law", "ring", "--seed", "1", "2", "--json", str(file)]) == 0
    assert asked == [("dmd2", "ring", 1), ("dmd2", "ring", 2)]
    rows = json.loads(file.read_text())
    assert [row["seed"] for row in rows] == [1, 2]
    assert {"method", "law", "metric", "value", "bound", "baseline", "seconds", "pass"} <= rows[0].keys()
    assert rows[0]["pass"] is True
    out = capsys.readouterr().out
    assert "dmd2    ring  mode_mass    0.1    0.5" in out
    assert "masses of dmd2 on ring: 0.750 0.250" in out


def test_a_missed_bound_is_said_and_exits_with_1(asked: list[tuple[str, str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "dmd2", "--law", "ring", "gaussian"]) == 1
    assert "1 of 2 bounds were missed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ode-pear"], "did you mean 'ode-pairs'?"),
        (["--law", "rings"], "did you mean 'ring'?"),
    ],
)
def test_unknown_names(asked: list[tuple[str, str, int]], words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", *words]) == 2
    assert says in capsys.readouterr().err
    assert asked == []


def test_what_is_proved_is_printed_and_kept_when_a_later_certificate_diverges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(method: type, law: str, *, seed: int) -> list[Row]:
        if law == "gaussian":
            raise UserError("diverged")
        return [Row(method.name(), law, "stray", float("nan"), 0.5, 1.0, 0.05, 1.0, seed)]

    monkeypatch.setattr(proof, "certify", answer)
    file = tmp_path / "rows.json"
    assert main(["certify", "ode-pairs", "--law", "ring", "gaussian", "--json", str(file)]) == 2
    assert "MISSED" in capsys.readouterr().out
    assert json.loads(file.read_text())[0] | {"value": None, "pass": False} == json.loads(file.read_text())[0]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_trained(
    asked: list[tuple[str, str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["certify", "ode-pairs", "--json", str(tmp_path / "file" / "rows.json")]) == 2
    assert asked == []


@pytest.mark.parametrize("method", [name for name, entry in methods().items() if entry.load().fixed_point])
def test_the_fixed_point_is_certified_without_training(method: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main(["certify", method, "--law", "fixed-point", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row["value"] < 1e-10 < 1e-2 < row["baseline"]


def test_all_methods_on_a_law_are_those_that_name_it(asked: list[tuple[str, str, int]]) -> None:
    assert main(["certify", "--law", "fixed-point"]) == 1
    assert [method for method, *_ in asked] == [name for name, entry in methods().items() if entry.load().fixed_point]
