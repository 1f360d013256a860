"""The list of methods is read from source; it must say what the classes themselves say."""

import dataclasses
import json

import pytest

from fastdiff.cli.main import main
from fastdiff.cli.methods import find, methods
from fastdiff.errors import UserError


def test_the_scan_agrees_with_the_classes():
    from fastdiff.trainers.method import Method

    def published(cls):  # other tests may have subclasses of their own
        own = {cls} if "info" in vars(cls) and cls.__module__.startswith("fastdiff.") else set()
        return own.union(*map(published, cls.__subclasses__()))

    entries = methods()
    classes = {name: entry.load() for name, entry in entries.items()}
    assert {"swiftbrush", "dmd2", "ode-pairs"} <= set(entries)
    assert published(Method) == set(classes.values())
    for name, cls in classes.items():
        assert cls.name() == name
        assert dataclasses.asdict(cls.info) == entries[name].paper
        assert cls.__doc__.startswith(entries[name].summary)
        assert entries[name].summary.endswith(".")


def test_json_is_a_list_of_flat_rows(capsys):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == sorted(methods())
    assert all({"summary", "title", "venue", "year", "arxiv", "sheet"} <= set(row) for row in rows)


def test_the_table_names_method_and_paper(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name, entry in methods().items():
        assert f"{name}\n    {entry.summary}\n    {entry.paper['title']}" in shown


def test_a_subclass_of_a_subclass_counts_and_a_helper_without_a_paper_does_not(tmp_path):
    (tmp_path / "_shared.py").write_text("class Shared(Method):\n    '''Abstract.'''\n")
    (tmp_path / "new_one.py").write_text(
        "class NewOne(Shared):\n    '''New.\n\n    More.'''\n    info = Paper(title='T', year=2030)\n"
    )
    (tmp_path / "tools.py").write_text("class Tool:\n    info = Paper(title='T')\n")
    found = methods(tmp_path)
    assert list(found) == ["new-one"]
    assert (found["new-one"].summary, found["new-one"].paper) == ("New.", {"title": "T", "year": 2030})


def test_an_unknown_method_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r"no method 'swiftbrsh', did you mean 'swiftbrush'\? Methods: .*dmd2"):
        find("swiftbrsh")
