"""Sums of a plan: the calls of many iterations, and the cycle in which they repeat."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdiff.trainers.method import Calls


def cycle(updates: Sequence[Any]) -> tuple[int, int]:
    """``(start, period)`` of the smallest sum with ``updates[i] == updates[i + period]`` from ``start`` to the end.

    >>> cycle("www" + "abbabbabb")
    (3, 3)
    """
    backward, n = updates[::-1], len(updates)
    same = [n, *[0] * (n - 1)]  # the Z function: how long backward[period:] agrees with backward
    low = high = 0
    for period in range(1, n):
        length = min(high - period, same[period - low]) if period < high else 0
        while period + length < n and backward[length] == backward[period + length]:
            length += 1
        same[period] = length
        if period + length > high:
            low, high = period, period + length
    period = max(range(1, n), key=same.__getitem__, default=n)
    return (n - period - same[period], period) if period < n and same[period] else (0, n)


def times(calls: Mapping[str, Calls], factor: int) -> dict[str, Calls]:
    """``calls``, each ``factor`` times."""
    return {name: Calls(factor * c.forward, factor * c.backward) for name, c in calls.items()}


def total(terms: Iterable[tuple[dict[str, Calls], int]]) -> dict[str, Calls]:
    """The calls of all terms, each so often."""
    result: dict[str, Calls] = {}
    for calls, count in terms:
        for name, value in times(calls, count).items():
            result[name] = result.get(name, Calls(0, 0)) + value
    return result
