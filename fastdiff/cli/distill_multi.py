"""``fastdiff distill-multi [METHOD]``: several students of one teacher, each for a part of the prompts, in one pipeline.

Takes the options of ``distill``; those of the engine and the method hold for every student. On several machines that share a
disk each trains its own with ``--student``; whoever finishes last saves the pipeline.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastdiff.cli.evaluate import measure, summary
from fastdiff.cli.loading import quiet
from fastdiff.cli.training import Run, run_options
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.trainers.config import Config
    from fastdiff.trainers.multi_student import Stage


@dataclass(kw_only=True)
class MultiRun(Run):
    """What the run starts from, how it is divided, and what it ends with."""

    students: int = 4
    """How many students the prompts are divided over."""
    partition: Literal["clusters", "blocks"] = "clusters"
    """Clusters of the prompts' embeddings, or blocks of the prompts in their order."""
    student: int | None = None
    """Train this student alone."""
    width: float = 1.0
    """Channels of a student, as a share of the teacher's; below 1 it first learns the teacher's scores."""
    tsm_steps: int = 1000
    """Iterations of that first stage, which is shared by all students."""
    adversarial_steps: int = 0
    """Iterations of a last stage with the method's GAN term; 0 leaves it out."""
    adversarial_weight: float = 1e-3
    """Weight of the GAN term there."""


def stages_of(options: MultiRun, config: "Config", method: Any) -> "dict[str, Stage]":
    """The stages that the options ask for, in their order.

    Raises:
        UserError: an adversarial stage of a method that has no GAN term.
    """
    from fastdiff.trainers import TeacherScoreMatching
    from fastdiff.trainers.multi_student import Stage

    stages = {}
    if options.width < 1:
        match = TeacherScoreMatching(width=options.width)
        stages["tsm"] = Stage(method=match, config=dataclasses.replace(config, max_steps=options.tsm_steps), shared=True)
    stages["dm"] = Stage(method=method, config=config)
    if options.adversarial_steps > 0:
        if not hasattr(method, "gan_weight"):
            raise UserError(f"{method.name()} has no GAN term: leave --adversarial-steps out, or take dmd2.")
        method = dataclasses.replace(method, gan_weight=options.adversarial_weight, warm_start_steps=0)
        stages["adm"] = Stage(method=method, config=dataclasses.replace(config, max_steps=options.adversarial_steps))
    return stages


def run(argv: Sequence[str]) -> int:
    """Divide, train, save, measure, print."""
    options, config, method, measuring = run_options(argv, command="distill-multi", run=MultiRun)
    from fastdiff.data.partition import Partition
    from fastdiff.data.prompts import read_prompts
    from fastdiff.models.teacher import Teacher
    from fastdiff.trainers._checks import check_folder
    from fastdiff.trainers.multi_student import MultiStudent

    quiet()
    check_folder(dataclasses.replace(config, resume=False))  # a run of one student in the same folder
    stages, teacher = stages_of(options, config, method), Teacher.from_pretrained(options.teacher, size=options.size)
    prompts, k = read_prompts(options.prompts, teacher), options.students
    by_clusters = options.partition == "clusters"
    partition = Partition.by_clusters(prompts, k, teacher, seed=config.seed) if by_clusters else Partition.by_class(prompts, k)
    print(f"students of {', '.join(map(str, partition.sizes))} prompts")
    whole = MultiStudent(teacher=teacher, partition=partition, stages=stages, folder=config.output_dir, resume=config.resume)
    pipeline = whole.train(None if options.student is None else [options.student])
    if pipeline is None:
        print(f"students {', '.join(map(str, whole.missing()))} are still to be trained in {config.output_dir}")
        return 0
    if options.evaluate:
        results, protocol, facts = measure({"students": pipeline}, teacher.pipeline, measuring, prompts=prompts)
        print(f"\n{summary([result.row() for result in results], protocol, facts)}\n")
    folder = config.output_dir
    print(f'students {folder}: DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)(prompt).images[0]')
    return 0
