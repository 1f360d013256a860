"""Measures a generator beside its teacher: features, statistics, metrics, cost, report."""
