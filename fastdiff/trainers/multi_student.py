"""Several one-step students of one teacher, each for a part of the prompts, trained apart and served as one pipeline.

    prompts = Y_1 + ... + Y_K, disjoint; student k minimises the method's own loss with every expectation over c in Y_k.

Each student is a run of the real ``Trainer`` with its own fake score and discriminator; nothing is shared but the teacher, the
stored ODE pairs (of all prompts: the paper's students collapsed on their own part's) and a ``shared`` first stage, which is run
once on all prompts. A later stage begins from the weights that the one before it left in the roles of the same names.

    tsm  teacher score matching on all prompts      smaller students only
    dm   distribution matching
    adm  the same with the adversarial term

Song et al., Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274. The class of the sheet's
name is here a dataclass over runs, no ``Method``: it has no loss of its own.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.data.partition import Partition
from fastdiff.errors import UserError
from fastdiff.models.condition import take
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Start
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import TOLERANCE, load_module, verify_export
from fastdiff.pipelines.routed import export_students
from fastdiff.trainers import checkpoint
from fastdiff.trainers.config import Config
from fastdiff.trainers.engine import Trainer
from fastdiff.trainers.method import Method

_SAMPLES = "samples.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run a student, or one run for all of them; ``config.output_dir`` and ``config.resume`` are set by ``MultiStudent``."""

    method: Method
    config: Config
    shared: bool = False


@dataclass(kw_only=True)
class MultiStudent:
    """K students, their stages, and the folder that becomes the pipeline.

    Args:
        stages: in order, by name; shared ones come first.
        network: what students begin from where it is not the teacher's network; a stage may build it instead (``tsm``).
        resume: go on where a run has a checkpoint, and start where it has none.

    >>> run = MultiStudent(teacher=teacher, partition=Partition.by_clusters(prompts, 4, teacher), folder=Path("runs/msd"),
    ...                    stages={"dm": Stage(method=DMD2(), config=Config(max_steps=2000))})
    >>> run.train(students=[2])         # this machine's; whoever finishes the last one exports
    """

    teacher: Teacher
    partition: Partition
    stages: Mapping[str, Stage]
    folder: Path
    network: nn.Module | None = None
    resume: bool = False
    result: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        order = [stage.shared for stage in self.stages.values()]
        if not order or order[-1] or order != sorted(order, reverse=True):
            raise UserError(
                f"stages {list(self.stages)} with shared {order}: there must be a stage of each student's own, after all "
                "shared ones, or all students would be the same."
            )
        for name, stage in self.stages.items():
            if len(stage.method.levels()) != 1:
                raise UserError(
                    f"stage {name} trains students of {len(stage.method.levels())} steps: the routing pipeline makes one."
                )
        if self.teacher.pipeline is not None and not hasattr(self.teacher.pipeline, "unet"):
            raise UserError(
                f"{self.teacher.name} is a {type(self.teacher.pipeline).__name__}: the routing pipeline is Stable Diffusion's with "
                "several UNets, and the trained students would fit into none. Distil one student of it."
            )

    def train(self, students: Sequence[int] | None = None) -> Any:
        """Train ``students`` (all by default); once every student is there, export and verify.

        Returns:
            The pipeline, or the networks of a teacher without one; None while students are missing.
        """
        chosen = range(self.partition.students) if students is None else students
        strange = [k for k in chosen if not 0 <= k < self.partition.students]
        if strange:
            raise UserError(f"no student {strange[0]}: the partition has 0..{self.partition.students - 1}.")
        self.partition.save(self.folder)
        for k in chosen:
            for name in self.stages:
                if not (self.stages[name].shared and k != chosen[0]):
                    self._run(name, k)
        return None if self.missing() else self.export()

    def run_folder(self, stage: str, student: int) -> Path:
        """Where a run keeps its checkpoints, log and student."""
        return self.folder / "runs" / ("all" if self.stages[stage].shared else str(student)) / stage

    def missing(self) -> list[int]:
        """The students that are not trained yet."""
        last = list(self.stages)[-1]
        return [k for k in range(self.partition.students) if not (self.run_folder(last, k) / _SAMPLES).is_file()]

    # --- one run ----------------------------------------------------------------------------------------------------

    def _run(self, name: str, student: int) -> None:
        stage, folder = self.stages[name], self.run_folder(name, student)
        again = self.resume and checkpoint.latest(folder / "checkpoints") is not None
        trainer = Trainer(
            dataclasses.replace(stage.method),
            self.teacher,
            prompts=list(self.partition.prompts),
            part=None if stage.shared else self.partition.rows(student),
            start=self._start(name, student),
            config=dataclasses.replace(stage.config, output_dir=folder, resume=again),
        )
        self._share_pairs(name, folder)
        trainer.train()
        self.result[f"{name}-{'all' if stage.shared else student}"] = trainer.result
        if trainer.samples is not None:
            prompts, noise, images = trainer.samples
            tensors = {"noise": noise.cpu().contiguous(), "images": images.cpu().contiguous()}
            save_file(tensors, folder / _SAMPLES, metadata={"prompts": json.dumps(prompts)})

    def _start(self, name: str, student: int) -> Start | None:
        names = list(self.stages)
        earlier = names[: names.index(name)]
        network = self._network(names[: len(earlier)])
        if not earlier:
            return None if network is None else Start(network=network)
        path = checkpoint.latest(self.run_folder(earlier[-1], student) / "checkpoints")
        if path is None:
            raise UserError(
                f"stage {name} of student {student} begins from {earlier[-1]}, which has no checkpoint: train it first."
            )
        saved = checkpoint.load(path)[1]
        roles = self.stages[name].method.roles()
        return Start(network=network, weights={role: saved[f"role.{role}"] for role in roles if f"role.{role}" in saved})

    def _network(self, stages: Sequence[str]) -> nn.Module | None:
        """The network that ``stages`` leave behind, by its shapes; None is the teacher's own."""
        builds = [self.stages[name].method.roles()["student"].build for name in stages]
        if self.network is not None or not any(builds):
            return self.network
        with torch.random.fork_rng(devices=[]):
            return next(build for build in builds if build is not None)(self.teacher)

    def _share_pairs(self, stage: str, folder: Path) -> None:
        """Take the pairs that another run made, of this stage if there is one; a run reads only what its own settings made."""
        folder.mkdir(parents=True, exist_ok=True)
        same, other = (sorted(self.folder.glob(f"runs/*/{name}/pairs-*.safetensors")) for name in (stage, "*"))
        for made in [*same, *other]:
            if not (folder / made.name).exists():
                shutil.copyfile(made, folder / made.name)

    # --- the end ----------------------------------------------------------------------------------------------------

    def export(self) -> Any:
        """Write the folder and compare its samples with those of all runs, in one shuffled batch."""
        last = list(self.stages)[-1]
        folders = [self.run_folder(last, k) for k in range(self.partition.students)]
        prompts, noise, images = _shuffled([_read_samples(folder) for folder in folders])
        if self.teacher.pipeline is None:
            return self._export_modules(folders, prompts, noise, images)
        note = {"teacher": self.teacher.name, "students": self.partition.students, "partition": self.partition.hash()}
        schedule = self.stages[last].method.schedule(self.teacher)
        note |= {"stages": {name: stage.method.name() for name, stage in self.stages.items()}, "call": schedule.call}
        export_students(folders, self.folder, note=note, prompt=prompts[0], save_partition=self.partition.save)
        self.result["export_max_abs_diff"] = verify_export(self.folder, schedule, prompts, noise, images)
        return load_students(self.folder)

    def _export_modules(self, folders: list[Path], prompts: list[str], noise: Tensor, images: Tensor) -> list[nn.Module]:
        networks, students = [], []
        for k, folder in enumerate(folders):
            target = self.folder / "students" / str(k)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "student.safetensors", target / "student.safetensors")
            network = copy.deepcopy(self._network(list(self.stages)) or self.teacher.family.backbone)
            load_module(network, target)
            networks.append(network)
            students.append(Denoiser(self.teacher.family.network(network), self.teacher.process, self.teacher.prediction_type))
        sample, route = list(self.stages.values())[-1].method.sample, self.partition.route(prompts)
        found = self.teacher.decode(sample_routed(students, route, noise, self.teacher.encode(prompts), sample))
        difference = (found - images).abs().max().item()
        if not difference < TOLERANCE:
            raise RuntimeError(f"{self.folder} differs from the trainers' samples by {difference:.2e}, allowed {TOLERANCE}.")
        self.result["export_max_abs_diff"] = difference
        return networks


@torch.no_grad()
def sample_routed(
    students: Sequence[Denoiser],
    route: Tensor,
    noise: Tensor,
    cond: Any,
    sample: Callable[[Denoiser, Tensor, Any], Tensor],
) -> Tensor:
    """Samples [B, ...] in the order of ``noise``: row i by student ``route[i]``, which gets all of its rows in one call."""
    output = torch.empty_like(noise)
    for k in route.unique().tolist():
        rows = (route == k).nonzero()[:, 0].to(noise.device)
        output[rows] = sample(students[k], noise[rows], take(cond, rows)).to(output)
    return output


def load_students(folder: str | Path) -> Any:
    """The pipeline of a folder that ``MultiStudent`` exported; it runs the folder's own ``multi_student.py``."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _read_samples(folder: Path) -> tuple[list[str], Tensor, Tensor]:
    with safe_open(folder / _SAMPLES, framework="pt") as file:
        return json.loads(file.metadata()["prompts"]), file.get_tensor("noise"), file.get_tensor("images")


def _shuffled(samples: list[tuple[list[str], Tensor, Tensor]]) -> tuple[list[str], Tensor, Tensor]:
    """The samples of all students in one order that has nothing to do with theirs."""
    prompts = [prompt for group, _, _ in samples for prompt in group]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    noise, images = torch.cat([z for _, z, _ in samples]), torch.cat([x for _, _, x in samples])
    return [prompts[i] for i in order.tolist()], noise[order], images[order]
