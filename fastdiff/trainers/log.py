"""What a run says: ``log.jsonl``, accelerate's trackers, and one progress bar with the loss terms and the time left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastdiff.trainers.health import Health


class Log:
    """Collects the terms of an iteration; every ``every`` iterations they become numbers, a line and a bar."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, total: int, every: int) -> None:
        self.accelerator, self.every, self.total = accelerator, every, total
        self.main = accelerator.is_main_process
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8") if self.main else None
        self._bar: Any = None
        self._latest: dict[str, Tensor | float] = {}
        self._terms: dict[str, Tensor] = {}
        if accelerator.log_with:
            accelerator.init_trackers(folder.name, init_kwargs={})

    def add(self, update: str, terms: dict[str, Tensor], norm: float, accepted: bool) -> None:
        """Note one update; a skipped one is said at once."""
        detached = {name: value.detach() for name, value in terms.items()}
        self._terms.update(detached)
        self._latest.update(detached)
        self._latest[f"grad_norm/{update}"] = norm
        if not accepted:
            self.say(f"skipped an update of {update}: its gradient is not finite")

    def step(self, step: int, seconds: float, health: Health) -> None:
        """End an iteration."""
        if step % self.every and step != self.total:
            return
        values = {name: float(value) for name, value in self._latest.items()}
        self._latest.clear()
        self.accelerator.log(values, step=step)
        if not self.main or self._file is None:
            return
        row = {"step": step, "seconds": round(seconds, 3), "skipped": health.total, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._bar is None:
            start = max(step - self.every, 0)
            self._bar = tqdm(total=self.total, initial=start, desc="training", unit="it", dynamic_ncols=True)
        shown = {name: f"{value:.3g}" for name, value in values.items() if "/" not in name}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def latest(self) -> dict[str, float]:
        """The last value of every loss term."""
        return {name: float(value) for name, value in self._terms.items()}

    def note(self, values: dict[str, float]) -> None:
        """Numbers for the next line."""
        self._latest.update(values)

    def progress(self, label: str, total: int) -> Callable[[int], None]:
        """A bar of its own for work before the training."""
        bar = tqdm(total=total, desc=label, dynamic_ncols=True, disable=not self.main)

        def advance(done: int) -> None:
            bar.update(done)
            if bar.n >= total:
                bar.close()

        return advance

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self.main:
            tqdm.write(text)

    def close_bar(self) -> None:
        """End the bar, so that its pace is that of the training alone."""
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        """Close file, bar and trackers."""
        self.close_bar()
        if self._file is not None:
            self._file.close()
        if self.accelerator.log_with:
            self.accelerator.end_training()
