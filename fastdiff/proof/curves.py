"""Reference curves: the loss terms of a short run of every method on a law, as bands over seeds that later runs must stay in.

A certificate says that a method ends where it should; a curve says, in seconds, that it still goes there as it did.
"""

import csv
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdiff.proof.laws import teacher
from fastdiff.trainers.config import Config
from fastdiff.trainers.engine import Trainer
from fastdiff.trainers.method import Method

STEPS, WINDOW = 100, 25
Curve = dict[tuple[str, int], float]
"""Median of a term over the window that ends at a step: in few dimensions DMD's normaliser makes single batches large."""


def curve(method: type[Method], *, seed: int) -> Curve:
    """The terms of the first ``STEPS`` iterations of the method's first trial, on one thread."""
    name, trial = next(iter(method.trials.items()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = Config(
                output_dir=Path(folder),
                max_steps=trial.max_steps,
                batch_size=256,
                seed=seed,
                validate_every=0,
                save_every=STEPS,
                log_every=1,
                lr_schedule="constant",
            )
            run = Trainer(method(**trial.fields), teacher(trial.law or name, seed=seed), config=config)
            run.start()
            for _ in range(STEPS):
                run.advance()
            run.close()
            rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    finally:
        torch.set_num_threads(threads)
    return _windows(rows)


def _windows(rows: list[dict[str, float]]) -> Curve:
    terms = [key for key in dict.fromkeys(key for row in rows for key in row) if "/" not in key]
    found: Curve = {}
    for term in (term for term in terms if term not in {"step", "seconds", "skipped"}):
        for end in range(WINDOW, STEPS + 1, WINDOW):
            values = [row[term] for row in rows if end - WINDOW < row["step"] <= end and term in row]
            if values:
                found[term, end] = statistics.median(values)
    return found


def write(path: Path, curves: Sequence[Curve]) -> None:
    """A table with the least and the largest value of each window over the ``curves`` of several seeds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["term", "step", "low", "high"])
        for key in curves[0]:
            values = [curve[key] for curve in curves]
            writer.writerow([*key, f"{min(values):.6g}", f"{max(values):.6g}"])


def outside(path: Path, found: Curve) -> list[str]:
    """What of a curve leaves its band, widened by the band's own width and a fifth of its value on either side."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = {(row["term"], int(row["step"])): (float(row["low"]), float(row["high"])) for row in csv.DictReader(file)}
    if rows.keys() != found.keys():
        return [f"other terms: {sorted(rows.keys() ^ found.keys())[:3]}"]
    said = []
    for key, (low, high) in rows.items():
        margin = high - low + 0.2 * max(abs(low), abs(high))
        if not low - margin <= found[key] <= high + margin:
            said.append(f"{key[0]} at step {key[1]} is {found[key]:.4g}, expected {low:.4g} .. {high:.4g}")
    return said
