"""What the metrics cost: the Frechet distance against scipy's matrix root as pytorch-fid uses it, and PRDC in bounded memory.

The same statistics go through both, alternating in one process; printed are the medians and the range of the paired ratios, one
JSON line a case. The root of pytorch-fid is ``sqrtm(S_1 S_2)``; its covariances count as given on both sides, except at n = 500,
where ours starts from the features. The covariances fall off as those of network features do.

python eval/bench_metrics.py --pairs 3
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import tyro
from scipy.linalg import sqrtm
from torch import Tensor

from fastdiff.eval.cost import peak_memory
from fastdiff.eval.frechet import covariance_factor, frechet
from fastdiff.eval.groups import frechet_few
from fastdiff.eval.prdc import prdc
from fastdiff.eval.stats import Stats


def features(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0, 1, d).double().mul(-4).exp()
    mix = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale) @ mix + 0.01 * seed


def by_scipy(a: Stats, b: Stats) -> float:
    s1, s2 = a.cov().numpy(), b.cov().numpy()
    delta = (a.mean - b.mean).numpy()
    return float(delta @ delta + s1.trace() + s2.trace() - 2 * sqrtm(s1 @ s2).trace().real)


def clock(action: Callable[[], Any]) -> tuple[float, float]:
    start = time.perf_counter()
    value = action()
    return time.perf_counter() - start, getattr(value, "value", value)


def compare(
    case: str, targets: dict[str, float], actions: dict[str, Callable[[], Any]], oracle: Callable[[], float], pairs: int
) -> None:
    """One line a way of ours: its time beside scipy's, measured in turn; ``scipy`` runs once a round for all of them."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    theirs, values = [], {}
    for _ in range(pairs):
        seconds, expected = clock(oracle)
        theirs.append(seconds)
        for name, action in actions.items():
            seconds, values[name] = clock(action)
            times[name].append(seconds)
    for name, ours in times.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        row = {
            "case": case, "way": name, "ours_s": round(statistics.median(ours), 3), "scipy_s": round(statistics.median(theirs), 2),
            "median_ratio": round(statistics.median(ratios), 4), "range": [round(min(ratios), 4), round(max(ratios), 4)],
            "asked": targets.get(name), "difference": abs(values[name] - expected) / abs(expected),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def main(pairs: int = 3, d: int = 2048, n: int = 3000, few: int = 500, prdc_n: int = 10_000) -> None:
    x, y = features(n, d, 1), features(n, d, 2)
    a, b = (Stats.of(f, extractor="bench") for f in (x, y))
    root = covariance_factor(b)
    full = {
        "value": lambda: frechet(a, b, error=False),
        "value and standard error": lambda: frechet(a, b),
        "value, root cached": lambda: frechet(a, b, root=root, error=False),
    }
    compare(f"d={d} n={n}", {"value": 0.25, "value, root cached": 0.1}, full, lambda: by_scipy(a, b), pairs)
    x, y = x[:few], y[:few]
    small, small_reference = (Stats.of(f, extractor="bench") for f in (x, y))
    thin = {"value": lambda: frechet_few(x, y, error=False), "value and standard error": lambda: frechet_few(x, y)}
    compare(f"d={d} n={few}", {"value": 0.01}, thin, lambda: by_scipy(small, small_reference), pairs)
    x, y = features(prdc_n, d, 1).float(), features(prdc_n, d, 2).float()
    with peak_memory() as memory:
        seconds, _ = clock(lambda: prdc(x, y))
    whole = 3 * prdc_n**2 * 4 / 2**20
    print(json.dumps({"case": f"prdc {prdc_n}x{prdc_n} d={d}", "seconds": round(seconds, 1), "peak_mib": round(memory.peak_mib),
                      "features_mib": round(2 * prdc_n * d * 4 / 2**20), "three_whole_matrices_mib": round(whole)}))  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
