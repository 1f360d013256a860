"""What a run refuses before it starts: the trainer raises the first refusal, the plan collects them all."""

from collections.abc import Callable

from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import check_exportable
from fastdiff.trainers import checkpoint
from fastdiff.trainers.config import Config
from fastdiff.trainers.method import Method


def checks(method: Method, teacher: Teacher, max_steps: int) -> list[Callable[[], None]]:
    """What a run of ``max_steps`` iterations must pass; each raises a UserError that says why it does not.

    The method's own reasons come before those of the export, which knows the consequence and not the setting.
    """
    samples = [lambda: check_exportable(teacher), lambda: check_steps(method, teacher)] if method.delivers == "pipeline" else []
    own = [lambda: method.check_length(max_steps), lambda: method.validate(teacher)]
    return [lambda: check_precision(teacher), *own, *samples]


def check_precision(teacher: Teacher) -> None:
    """Refuse a teacher in half precision."""
    if next(teacher.family.backbone.parameters()).itemsize < 4:
        raise UserError(
            f"the teacher {teacher.name} is loaded in half precision: small steps on such weights round to nothing. "
            "Load it in float32 and pass mixed_precision='bf16'."
        )


def check_steps(method: Method, teacher: Teacher) -> None:
    """Refuse a student that is called at times which no stock scheduler visits."""
    if teacher.pipeline is None or method.levels() == [LEVELS - 1]:
        return
    try:
        method.schedule(teacher).parts(teacher)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{method.name()} calls its student at times {method.timesteps(teacher)}, which no exported pipeline of {teacher.name} "
            f"does: {error} Its pictures would not be the trainer's."
        ) from error


def check_folder(config: Config) -> None:
    """Refuse an output folder with another run in it, or with none to resume."""
    newest = checkpoint.latest(config.output_dir / "checkpoints")
    if config.resume and newest is None:
        raise UserError(f"nothing to resume in {config.output_dir}: it has no checkpoint. Start without --resume.")
    if not config.resume and newest is not None:
        raise UserError(
            f"{config.output_dir} holds the checkpoints of an earlier run, which this one would mix with its own. "
            "Continue it with --resume, or choose another --output, or delete the folder."
        )
