import json
import math

import pytest

from fastdiff.errors import UserError
from fastdiff.eval.report import changes, read_facts, read_rows, rows_json, rows_jsonl

ROWS = [
    {"model": "teacher", "steps": 25, "nfe": 50.0, "fd": 0.5, "fd_se": 0.03, "clip": None, "groups": {"boot": [1.5, 0.25]}},
    {"model": "student", "steps": 1, "nfe": 1.0, "fd": 0.75, "fd_se": 0.04, "clip": 31.5, "clip_se": 0.1},
]


def test_rows_come_back_from_both_formats(tmp_path):
    rows_json(tmp_path / "rows.json", ROWS, command="c", environment={"python": "3"})
    rows_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read_rows(tmp_path / "rows.json") == read_rows(tmp_path / "rows.jsonl") == ROWS
    assert read_facts(tmp_path / "rows.json") == {"command": "c", "environment": {"python": "3"}}
    assert read_facts(tmp_path / "rows.jsonl") == {}
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["model"] for line in lines] == ["teacher", "student"]


def test_lines_of_one_row_and_blank_lines_are_read(tmp_path):
    rows_jsonl(tmp_path / "one.jsonl", ROWS[:1], protocol="fashion#1")
    assert read_rows(tmp_path / "one.jsonl") == [{**ROWS[0], "protocol": "fashion#1"}]
    (tmp_path / "gaps.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), ""]))
    assert read_rows(tmp_path / "gaps.jsonl") == ROWS


def test_lines_refuse_nan_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows_jsonl(tmp_path / "rows.jsonl", [{"model": "a", "fd": math.nan}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no rows"),
        ('{"rows": []}', "no rows"),
        ('{"rows": {"model": "a"}}', "no rows"),
        ('[{"model": "a"}]', "a JSON list"),
        ("3", "a JSON int"),
        ('{"rows": [{"fd": 1}]}', "row 1 of .* no model"),
        ('{"rows": [{"model": "a"}, 3]}', "row 2 of .* no model"),
        ('{"model": "a"}\n{"fd": 1}', "row 2 of .* no model"),
        ('{"step": 3, "loss": 0.5}', "row 1 of .* no model"),
        ('{"model": "a"}\n{"model": ', "line 2 of .* no JSON"),
        ('{"model": "a", "fd": NaN}', "line 1 of .*NaN is no JSON number"),
        ('{"model": "a", "fd": [1]}', "'fd' in row 1"),
        ('{"model": "a", "groups": {"boot": 3}}', "'groups' in row 1"),
        ('{"model": "a", "groups": 3}', "'groups' in row 1"),
        ("<html>", "line 1 of .* no JSON"),
    ],
)
def test_anything_else_is_the_users_error(content, says, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        read_rows(path)


def test_unreadable_files_are_the_users_error(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    for name in ("missing.json", "picture.png", "."):
        with pytest.raises(UserError, match="cannot read the rows"):
            read_rows(tmp_path / name)


def change(before, after, column="fd"):
    (found,) = [c for c in changes([{"model": "a", **before}], [{"model": "a", **after}]) if c.column == column]
    return found


def test_a_change_counts_beyond_twice_the_joint_error():
    for after, beyond in ((1.099, False), (1.101, True), (0.901, False), (0.899, True), (1.0, False)):
        found = change({"fd": 1.0, "fd_se": 0.03}, {"fd": after, "fd_se": 0.04})
        assert found.joint_se == pytest.approx(0.05)
        assert found.difference == pytest.approx(after - 1)
        assert found.exceeds is beyond


def test_a_change_without_both_errors_is_not_judged():
    for errors in (({}, {}), ({"fd_se": 0.1}, {}), ({}, {"fd_se": 0.1}), ({"fd_se": math.nan}, {"fd_se": 0.1})):
        found = change({"fd": 1.0, **errors[0]}, {"fd": 9.0, **errors[1]})
        assert (found.difference, found.exceeds) == (8.0, None)


def test_a_value_that_appears_or_goes_is_a_change_without_difference():
    gone, new = change({"fd": 1.0}, {"fd": None}), change({}, {"fd": 2.0})
    assert (gone.before, gone.after, gone.difference, gone.exceeds) == (1.0, None, None, None)
    assert (new.before, new.after) == (None, 2.0)


def test_changes_are_of_the_models_and_numbers_that_both_have():
    found = changes([*ROWS, {"model": "old", "fd": 1.0}], [{"model": "new", "fd": 1.0}, *reversed(ROWS)])
    assert [(c.model, c.column) for c in found] == [
        *(("student", c) for c in ("steps", "nfe", "fd", "clip")),
        *(("teacher", c) for c in ("steps", "nfe", "fd")),
    ]
    assert {c.difference for c in found} == {0.0}


def test_scores_of_different_protocols_are_not_compared():
    one, other = ({"model": "a", "fd": 1.0, "protocol": name} for name in ("fashion#1", "fashion#2"))
    with pytest.raises(UserError, match="fashion#1 before and fashion#2 now"):
        changes([one], [other])
    assert len(changes([one], [one])) == len(changes([{"model": "a", "fd": 1.0}], [one])) == 1


def test_two_rows_of_one_name_are_refused():
    for pair in (([ROWS[0], ROWS[0]], ROWS), (ROWS, [ROWS[1], ROWS[1]])):
        with pytest.raises(UserError, match="two rows are called"):
            changes(*pair)
