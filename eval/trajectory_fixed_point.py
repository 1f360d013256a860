"""Where trajectory consistency leads a student that does not see its end, worked out exactly on the law `gaussian`.

In each principal direction, of variance v, everything is linear: f(x, t) = c_t x. Minimising the squared loss over c_t, from the
lowest time upwards, with the exact law (or, in later stages, the student of the stage before) as teacher, gives the fixed point
that training tends to, without any network or sampling error. Printed are flow_map and axes of `fastdiff certify` for deterministic
sampling, which are 0 for a student that is right.

python eval/trajectory_fixed_point.py
"""

import numpy as np
import torch
import tyro

from fastdiff.diffusion.solvers import lcm_times
from fastdiff.proof import laws
from fastdiff.trainers._segments import segment_edges

LAW = laws.exact("gaussian")
TABLE = LAW.process.alphas_cumprod.numpy()  # type: ignore[attr-defined]
A, S = np.sqrt(TABLE), np.sqrt(1 - TABLE)
Coefficients = dict[int, float]


def fixed_point(v: float, n: int, k: int, teacher: Coefficients | None, *, ends: str = "random") -> Coefficients:
    """c at all n times, in k segments; ``ends`` random, or the segments' edges alone (PCM, and LCM for k = 1)."""
    found: Coefficients = {}
    edges = segment_edges(n, k)
    for i in range(n):
        t, u = 1000 // n * (i + 1) - 1, max(1000 // n * i - 1, 0)
        low = max(1000 // n * max(e for e in edges if e <= i) - 1, 0)
        x0 = A[t] * v / (TABLE[t] * v + 1 - TABLE[t]) if teacher is None else teacher[t]
        x_u = A[u] * x0 + S[u] * (1 - A[t] * x0) / S[t]
        e = np.arange(low, u + 1) if ends == "random" else np.array([low])
        target = np.where(e == u, 1.0, (A[e] - S[e] * A[u] / S[u]) * found.get(u, 0.0) + S[e] / S[u]) * x_u
        slope = A[e] - S[e] * A[t] / S[t]
        found[t] = float((slope * (target - S[e] / S[t])).sum() / (slope**2).sum())
    return found


def sample(c: Coefficients, levels: list[int]) -> float:
    """What deterministic sampling, ending at row 0, multiplies noise by."""
    x = 1.0
    for t, u in zip(levels, [*levels[1:], 0], strict=True):
        x = A[u] * c[t] * x + S[u] * (x - A[t] * c[t] * x) / S[t]
    return float(x)


def staged(v: float, n: int, segments: tuple[int, ...]) -> Coefficients:
    """Each stage taught by the one before."""
    c: Coefficients | None = None
    for k in segments:
        c = fixed_point(v, n, k, c)
    return c or {}


def main(original_steps: int = 40) -> None:
    n = original_steps
    variances = torch.linalg.eigvalsh(LAW.moments()[1]).tolist()
    students = {
        "lcm": lambda v: fixed_point(v, n, 1, None, ends="edge"),
        "tcd, and hyper-sd with stage_teacher first": lambda v: fixed_point(v, n, 1, None),
        "hyper-sd 8-4-2-1": lambda v: staged(v, n, (8, 4, 2, 1)),
    }
    for name, student in students.items():
        for steps in (1, 2, 4, 8):
            scales = np.array([sample(student(v), lcm_times(steps, n)) for v in variances])
            exact = np.sqrt([v / (TABLE[999] * v + 1 - TABLE[999]) for v in variances])
            flow_map = np.sqrt(((scales - exact) ** 2).sum() / sum(variances))
            axes = np.abs(scales**2 / np.array(variances) - 1).max()
            print(f"{name}: {steps} steps, flow_map {flow_map:.3f}, axes {axes:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
