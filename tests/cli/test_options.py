"""Options from dataclasses and YAML."""

from dataclasses import dataclass

import pytest

from fastdiff.cli.options import field_names, nearest, parse, read_yaml, take_option, yaml_words
from fastdiff.errors import UserError


@dataclass(kw_only=True)
class Run:
    teacher: str = "fashion"
    """The teacher."""
    resume: bool = False
    """Go on."""
    max_steps: int = 100
    """Steps."""


@dataclass(kw_only=True)
class Paper:
    ratio: tuple[int, int] = (1, 5)
    """Two integers."""
    lr: float = 1e-4
    """Rate."""
    prompts: str | None = None
    """File."""


def both(run: Run, paper: Paper) -> tuple[Run, Paper]:
    return run, paper


def parsed(words):
    return parse(both, words, command="test", description="A test.")


def test_options_are_flat_typed_and_the_last_word_wins():
    run, paper = parsed(["--max-steps", "5", "--ratio", "2", "3", "--lr=-1e-3", "--resume", "--max_steps", "7"])
    assert run == Run(max_steps=7, resume=True)
    assert paper == Paper(ratio=(2, 3), lr=-1e-3)


@pytest.mark.parametrize("words", [["--max-stpes", "5"], ["--max-steps", "x"], ["--ratio", "1"], ["stray"]])
def test_a_wrong_option_exits_with_2_and_says_so_on_stderr(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        parsed(words)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words[0].lstrip("-") in err
    assert "Traceback" not in err
    if words[0] == "--max-stpes":
        assert "--max-steps" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--learning-rate", "1e-4"], "no option --learning-rate, did you mean --lr?"),
        (["--learning_rate=1e-4"], "no option --learning_rate, did you mean --lr?"),
        (["--iterations", "5"], "no option --iterations, did you mean --max-steps?"),
    ],
)
def test_the_name_that_others_have_for_an_option_is_told_ours(words, says):
    with pytest.raises(UserError) as error:
        parsed(words)
    assert str(error.value) == says


def test_a_method_with_another_rate_is_named_that_one():
    assert nearest("learning_rate", ["max_steps", "regression_lr"]) == ", did you mean 'regression_lr'?"
    assert nearest("learning_rate", ["max_steps", "lr", "fake_score_lr"]) == ", did you mean 'lr'?"
    assert nearest("guidance_scale", ["lr", "guidance_range"]) == ", did you mean 'guidance_range'?"


def test_help_shows_the_docstring_under_a_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(["--help"])
    assert stopped.value.code == 0
    assert "Two integers. (default: 1 5)" in capsys.readouterr().out


def test_a_yaml_file_becomes_words_of_equal_meaning(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max-steps: 5\nratio: [2, 3]\nlr: 1e-3\nresume: true\nprompts: null\nteacher: -odd name\n")
    words = yaml_words(str(path), read_yaml(str(path)), field_names(Run, Paper))
    run, paper = parsed(words)
    assert run == Run(max_steps=5, resume=True, teacher="-odd name")
    assert paper == Paper(ratio=(2, 3), lr=1e-3)
    assert parsed([*words, "--no-resume", "--max-steps", "9"])[0] == Run(max_steps=9, teacher="-odd name")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_stpes: 5", "no option 'max_stpes', did you mean 'max_steps'?"),
        ("ratio: {a: 1}", "options are flat"),
        ("- 1\n- 2", "holds a list"),
        ("a: [1", "cannot be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_yaml_file_is_named_with_the_reason(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"--config .*run\.yaml") as error:
        yaml_words(str(path), read_yaml(str(path)), field_names(Run, Paper))
    assert expected in str(error.value)


def test_take_option_finds_both_spellings_and_leaves_the_rest():
    assert take_option(["a", "--config", "f", "b"], "--config") == ("f", ["a", "b"])
    assert take_option(["--config=f", "b"], "--config") == ("f", ["b"])
    assert take_option(["b"], "--config") == (None, ["b"])
    with pytest.raises(UserError, match="needs a file"):
        take_option(["--config"], "--config")


def test_nearest_says_nothing_about_a_word_from_nowhere():
    assert nearest("swiftbrsh", ["swiftbrush", "dmd2"]) == ", did you mean 'swiftbrush'?"
    assert nearest("zzz", ["swiftbrush", "dmd2"]) == "."
