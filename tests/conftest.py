"""Threads, before torch is loaded: a worker of pytest-xdist keeps to its share of the cores, and those that wait do not spin."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(share, 1))
