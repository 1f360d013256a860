"""The engine's options."""

import math
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.trainers.config import FREE_ON_RESUME, Config


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("max_step", "max_steps"), ("batchsize", "batch_size"), ("warmup", "warmup_steps"), ("output-dir", "output_dir")],
)
def test_an_unknown_option_names_the_nearest(given: str, nearest: str) -> None:
    """FastVideo and flash-diffusion drop unknown options with a warning or without one."""
    with pytest.raises(UserError, match=f"no option '{given}'.*Did you mean '{nearest}'"):
        Config.of(**{given: 1})


def test_an_option_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no option 'zzz'.*max_steps"):
        Config.of(zzz=1)


def test_known_options_are_taken() -> None:
    config = Config.of(max_steps=7, output_dir="runs/x", trackers=("tensorboard",))
    assert (config.max_steps, config.output_dir, config.trackers) == (7, Path("runs/x"), ("tensorboard",))
    assert Config.of() == Config()


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "accumulation", "save_every", "keep_checkpoints", "log_every"])
def test_counts_are_at_least_one(name: str) -> None:
    for value in (0, -3):
        with pytest.raises(UserError, match=f"{name} is {value}"):
            Config.of(**{name: value})


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan])
def test_an_average_that_never_learns_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="ema_decay"):
        Config(ema_decay=value)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_gradient_norm_of_zero_or_less_is_refused(value: float) -> None:
    """0 would clip every gradient to nothing, a negative norm turns its sign: both train, and learn nothing or the opposite."""
    with pytest.raises(UserError, match="max_grad_norm"):
        Config(max_grad_norm=value)


@pytest.mark.parametrize(("name", "value"), [("lr_schedule", "cosin"), ("mixed_precision", "fp8")])
def test_a_misspelt_choice_is_refused(name: str, value: str) -> None:
    """From Python nobody checks a Literal: 'cosin' would be a constant rate."""
    with pytest.raises(UserError, match=name):
        Config.of(**{name: value})


# --- learning rates


def factors(**options: object) -> list[float]:
    config = Config.of(**options)
    return [config.lr_factor(step) for step in range(config.max_steps)]


def test_warmup_rises_linearly_to_one_and_its_first_step_is_not_lost() -> None:
    assert factors(max_steps=6, warmup_steps=4, lr_schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_ends_one_step_before_zero() -> None:
    """The last iteration, max_steps - 1, must still learn."""
    assert factors(max_steps=7, warmup_steps=2, lr_schedule="linear") == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert Config.of(max_steps=7, warmup_steps=2).lr_factor(7) == 0


def test_cosine_decay() -> None:
    got = factors(max_steps=6, warmup_steps=2, lr_schedule="cosine")
    root = math.sqrt(0.5)
    assert got == pytest.approx([0.5, 1, 1, 0.5 * (1 + root), 0.5, 0.5 * (1 - root)])


def test_no_warmup() -> None:
    assert factors(max_steps=4, warmup_steps=0, lr_schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors(max_steps=3, warmup_steps=0, lr_schedule="constant") == [1.0] * 3


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_shorter_than_its_warmup_stays_positive(schedule: str) -> None:
    got = factors(max_steps=3, warmup_steps=5, lr_schedule=schedule)
    assert got == pytest.approx([0.2, 0.4, 0.6])


def test_what_may_change_on_resume_are_options() -> None:
    """And nothing that changes what is computed: rates depend on max_steps, warm-up and schedule."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(Config)}
    assert names > FREE_ON_RESUME
    assert not FREE_ON_RESUME & {
        "max_steps",
        "batch_size",
        "accumulation",
        "mixed_precision",
        "max_grad_norm",
        "warmup_steps",
        "lr_schedule",
        "ema_decay",
        "seed",
    }
