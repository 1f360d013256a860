"""``Trainer``: the one loop. It knows devices, precision, accumulation, checkpoints and logs, and no loss.

>>> trainer = Trainer(SwiftBrush(), Teacher.from_pretrained("fashion"), output_dir="runs/sb", max_steps=1000)
>>> pipeline = trainer.train()          # a diffusers pipeline, already saved in runs/sb

One iteration: for each update the method asks for, the roles it trains receive gradient and no others do; its losses over the
micro-batches are added; gradients are averaged over processes (one all-reduce of a flat buffer per update: roles that are
adapters on one backbone cannot each be a DDP module); clipped; stepped. Ctrl-C ends after the running iteration with a
checkpoint that ``resume=True`` continues to the bit.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fastdiff.data.images import save_grid
from fastdiff.data.prompts import PromptTable, cycled, read_prompts
from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles, Start
from fastdiff.models.teacher import Teacher
from fastdiff.trainers import checkpoint
from fastdiff.trainers._checks import check_folder, checks
from fastdiff.trainers._monitors import Monitor
from fastdiff.trainers.config import FREE_ON_RESUME, Config
from fastdiff.trainers.draws import Draws, generator_for
from fastdiff.trainers.health import Health
from fastdiff.trainers.log import Log
from fastdiff.trainers.method import Batch, Finished, Method, Preparation

_SHOWN = 16


def optimizer_of(role: Role, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that trains a role."""
    options: dict[str, Any] = {"lr": role.lr, "betas": role.betas, "eps": role.eps, "weight_decay": role.weight_decay}
    if role.optimizer == "radam":
        return torch.optim.RAdam(parameters, **options, decoupled_weight_decay=True)
    return torch.optim.AdamW(parameters, **options)


class Trainer:
    """Trains ``method`` on ``teacher``.

    Args:
        method: the algorithm with its hyper-parameters.
        teacher: the frozen teacher.
        prompts: a list, a text file with one prompt a line, or None for the bundled world's own captions.
        config: the engine's options; or give them as keywords.
        part: rows of the prompts that the student is for, if not all; ODE pairs are of all of them nevertheless.
        start: what roles begin from, if not the teacher.

    Raises:
        UserError: an unknown option, an empty prompts file, a teacher the method refuses.
    """

    def __init__(
        self,
        method: Method,
        teacher: Teacher,
        *,
        prompts: str | Path | Sequence[str] | None = None,
        config: Config | None = None,
        part: Sequence[int] | None = None,
        start: Start | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise UserError(f"give either config or the options {sorted(options)}, not both: one would be ignored.")
        self.method, self.teacher = method, teacher
        self.config = config or Config.of(**options)
        self.accelerator = Accelerator(mixed_precision=self.config.mixed_precision, log_with=list(self.config.trackers) or None)
        for check in checks(method, teacher, self.config.max_steps):
            check()
        teacher.family.to(self.accelerator.device)
        self.prompts = PromptTable(read_prompts(prompts, teacher), teacher, part=part)
        self._origin = start
        self.folder = self.config.output_dir
        self.result: dict[str, Any] = {}
        self.samples: tuple[list[str], Tensor, Tensor] | None = None
        """Prompts, noise and what the student made of them at the end."""
        self._stop_requested = False
        self._log: Any = None
        self._roles: Any = None

    def train(self) -> Any:
        """Run to ``max_steps``, export, verify the export; returns the diffusers pipeline, or the network of a teacher without.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
            UserError: training diverged, the disk is full, or there is nothing to resume.
        """
        try:
            self.start()
            self._loop()
            return self._finish()
        finally:
            self.close()

    # --- setting up -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Build roles and optimisers, resume if asked to, let the method prepare; ``train`` does this itself."""
        self._make_folder()
        torch.manual_seed(self.config.seed)
        self._teacher_hash = self.teacher.identity()
        self._roles = Roles(self.teacher, self.method.roles(), self._origin)
        self._optimizers = {name: self._optimizer(name) for name, role in self.method.roles().items() if role.learns}
        self._ema = self._average()
        self._health = Health(self.config.max_bad_steps)
        self._log = Log(self.folder, self.accelerator, total=self.config.max_steps, every=self.config.log_every)
        self._monitor = Monitor(self.method, self._roles, *self._fixed(_SHOWN))
        self._step, self._seconds = 0, 0.0
        if self.config.resume:
            self._resume(checkpoint.latest(self.folder / "checkpoints"))
        clock = time.perf_counter()
        self.method.prepare(
            Preparation(
                teacher=self.teacher,
                prompts=self.prompts,
                folder=self.folder,
                seed=self.config.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                max_steps=self.config.max_steps,
                progress=self._log.progress,
                say=self._log.say,
            )
        )
        self._seconds += time.perf_counter() - clock

    def _make_folder(self) -> None:
        check_folder(self.config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the output folder {self.folder}: {error}. Choose another --output.") from error

    def _optimizer(self, name: str) -> Any:
        return self.accelerator.prepare(optimizer_of(self.method.roles()[name], self._roles.parameters(name)))

    def _average(self) -> EMAModel | None:
        student, decay = self._roles.parameters("student"), self.config.ema_decay
        return EMAModel(student, decay=decay, use_ema_warmup=True, power=0.75, foreach=True) if decay else None

    def _restart(self, names: tuple[str, ...]) -> None:
        if "student" in names and self._ema:
            self._ema.copy_to(self._roles.parameters("student"))
            self._ema = self._average()
        for name in names:
            self._optimizers[name] = self._optimizer(name)

    def close(self) -> None:
        """Close the logs and take the adapters off the teacher."""
        if self._log is not None:
            self._log.close()
        if self._roles is not None:
            self._roles.close()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        previous = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, self._on_interrupt)
            while self._step < self.config.max_steps:
                self.advance()
                self._after_iteration()
        finally:
            signal.signal(signal.SIGINT, previous)

    def advance(self) -> None:
        """Make one iteration and log it."""
        clock = time.perf_counter()
        self._iteration(self._step)
        self._step += 1
        self._seconds += time.perf_counter() - clock
        self._log.step(self._step, self._seconds, self._health)

    def _on_interrupt(self, *_: Any) -> None:
        if self._stop_requested:
            raise KeyboardInterrupt("second interrupt: the running iteration is lost")
        self._stop_requested = True

    def _iteration(self, step: int) -> None:
        torch.manual_seed(generator_for(self.config.seed, self.accelerator.process_index, step).initial_seed())
        micro = self._micro_batches(step)
        factor = self.config.lr_factor(step)
        self._restart(self.method.restarts(step))
        self.method.begin(step, self._roles)
        for update in self.method.updates(step):
            trained = self.method.trains(update)
            terms = self._backward(update, micro, trained)
            if not trained:
                continue
            norm = self._reduce_and_clip(trained)
            accepted = self._health.accept(norm, update=update, step=step)
            for name in trained:
                optimizer = self._optimizers[name]
                optimizer.param_groups[0]["lr"] = factor * self.method.lr_of(name, step)
                if accepted:
                    optimizer.step()
                optimizer.zero_grad()
            if accepted and "student" in trained and self._ema:
                self._ema.step(self._roles.parameters("student"))
            if accepted:
                self.method.after(update, self._roles)
            self._log.add(update, terms, norm, accepted)

    def _micro_batches(self, step: int) -> list[Batch]:
        size, count = self.config.batch_size, self.config.accumulation
        rank, device = self.accelerator.process_index, self.accelerator.device
        parts = [slice(i * size, (i + 1) * size) for i in range(count)]
        draws = [Draws(self.config.seed, rank, step, size=size * count, part=part, device=device) for part in parts]
        shared: dict[str, Any] = {}
        return [Batch(d, self.prompts, self.teacher, shared=shared) for d in draws]

    def _backward(self, update: str, micro: list[Batch], trained: tuple[str, ...]) -> dict[str, Tensor]:
        """Gradients of the mean loss over the micro-batches; returns the means of its terms."""
        self._roles.train_only(*trained)
        means: dict[str, Tensor] = {}
        for batch in micro:
            with self.accelerator.autocast(), torch.set_grad_enabled(bool(trained)):
                terms = self.method.loss(update, batch, self._roles)
            if trained:
                self.accelerator.backward(sum(terms.values()) / len(micro))
            means = {name: means.get(name, 0.0) + value.detach() / len(micro) for name, value in terms.items()}
        return means

    def _reduce_and_clip(self, trained: tuple[str, ...]) -> float:
        parameters = [p for name in trained for p in self._roles.parameters(name)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            flat = self.accelerator.reduce(flat, reduction="mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        return float(norm)

    def _after_iteration(self) -> None:
        config, step = self.config, self._step
        last = step == config.max_steps
        stopping = self._agreed_to_stop()  # asked in every iteration, by every process
        if step % config.save_every == 0 or last or stopping:
            self._save()
        if stopping and not last:
            raise KeyboardInterrupt(f"stopped after {step} of {config.max_steps} iterations; continue with --resume")
        if config.validate_every and step % config.validate_every == 0:
            self._validate()

    def _agreed_to_stop(self) -> bool:
        """A Ctrl-C that reached one process stops all of them in the same iteration."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self._stop_requested), device=self.accelerator.device)
            self._stop_requested = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        return self._stop_requested

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a continuation must share with the run it continues."""
        options = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE_ON_RESUME}
        fields = {**dataclasses.asdict(self.method), **options, "world_size": self.accelerator.num_processes}
        fields |= {"method": self.method.name(), "teacher": self.teacher.name, "teacher_hash": self._teacher_hash}
        fields |= {"prompts": len(self.prompts), "prompts_hash": self.prompts.hash()}
        if self.prompts.part is not None:
            fields["part"] = self.prompts.part.tolist()
        if self._origin is not None:
            fields["start"] = self._origin.hash()
        return json.loads(json.dumps(fields, default=str))

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            tensors: dict[str, dict[str, Tensor]] = {f"role.{name}": self._roles.state(name) for name in self._roles.specs}
            for name, optimizer in self._optimizers.items():
                tensors[f"optimizer.{name}"] = checkpoint.optimizer_tensors(optimizer.optimizer)
            if self._ema:
                tensors["ema"] = {str(i): p for i, p in enumerate(self._ema.shadow_params)}
            state = {
                "run": self._identity(),
                "health": self._health.state(),
                "seconds": self._seconds,
                "ema_steps": self._ema.optimization_step if self._ema else 0,
            }
            checkpoint.save(self.folder / "checkpoints", self._step, state, tensors, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self, path: Path | None) -> None:
        assert path is not None, "_make_folder refuses to resume where nothing is"
        state, tensors = checkpoint.load(path)
        mine, theirs = self._identity(), state["run"]
        changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if changed:
            shown = ", ".join(f"{k} was {theirs.get(k)!r} and is {mine.get(k)!r}" for k in changed[:3])
            raise UserError(
                f"cannot resume {path}: {shown}. The run would not repeat itself; give the same options, or "
                "start another run in another --output."
            )
        for name in self._roles.specs:
            self._roles.load(name, tensors[f"role.{name}"])
        for name, optimizer in self._optimizers.items():
            checkpoint.load_optimizer(optimizer.optimizer, tensors[f"optimizer.{name}"])
        if self._ema:
            self._ema.shadow_params = [tensors["ema"][str(i)].to(p) for i, p in enumerate(self._ema.shadow_params)]
            self._ema.optimization_step = state["ema_steps"]
        self._health.load(state["health"])
        self._step, self._seconds = state["step"], state["seconds"]

    # --- pictures and the end ---------------------------------------------------------------------------------------

    def _with_ema(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` with the averaged weights in the student, then put the trained ones back."""
        if not self._ema:
            return action()
        parameters = self._roles.parameters("student")
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            return action()
        finally:
            self._ema.restore(parameters)

    def _fixed(self, n: int) -> tuple[list[str], Tensor]:
        """Prompts and noise that are the same throughout a run."""
        generator = generator_for(self.config.seed, "validation")
        index = self.prompts.rows(cycled(self.prompts.drawable, n, generator))
        noise = torch.randn(n, *self.teacher.latent_shape, generator=generator)
        return [self.prompts.prompts[i] for i in index.tolist()], noise.to(self.accelerator.device)

    @torch.no_grad()
    def _preview(self) -> Tensor:
        return self.method.preview(self._roles, *self._fixed(_SHOWN))

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            with self._roles.at_rest():
                self._look()

    def _look(self) -> None:
        images = self._with_ema(self._preview)
        self._show(images, f"step-{self._step:08d}.png")
        if self.method.delivers == "pipeline":
            signals, advice = self._monitor.look(self._log.latest(), self._health.share)
            self._log.note({f"health/{name}": value for name, value in signals.items()})
            for text in advice:
                self._log.say(f"step {self._step}: {text}")

    def _show(self, images: Tensor, name: str) -> None:
        if images.ndim == 4 and images.shape[1] in {1, 3}:  # what a teacher decodes to need not be pictures
            save_grid(images, self.folder / "validation" / name)

    def _finish(self) -> Any:
        if not self.accelerator.is_main_process:
            return None
        network, adapter = self._with_ema(lambda: (self._roles.merged("student"), self._roles.adapter("student")))
        note = self.method.note(self.teacher) | {"run": self._identity()}
        self._roles.close()
        self._log.close_bar()
        delivered = self.method.deliver(Finished(self.teacher, network, self.folder, note, *self._fixed(_SHOWN), adapter))
        self.samples = (*self._fixed(_SHOWN), delivered.images)
        self._show(delivered.images, "final.png")
        difference = delivered.difference
        self._log.say(f"exported to {self.folder}; {delivered.reader} differs from the trainer by {difference:.1e} at most")
        self.result = {
            "method": self.method.name(),
            "teacher": self.teacher.name,
            "steps": self._step,
            "seed": self.config.seed,
            "seconds_train": round(self._seconds, 2),
            "export_max_abs_diff": difference,
            "bad_updates": self._health.total,
            "warnings": self._monitor.warnings,
            "network_samples": dict(self._roles.ledger),
        }
        return delivered.product
