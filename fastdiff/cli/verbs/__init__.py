"""``fastdiff eval VERB``: each verb is a module with ``run(argv) -> exit code`` over one function of ``fastdiff.eval``."""

VERBS = {
    "compare": "say whether two result files differ by more than their errors; refuses different protocols",
    "stats": "write the reference statistics of a folder of images",
    "grid": "put folders of images or pipelines side by side, the same noise a column",
    "bench": "measure what an image costs: network calls, latency, memory, size",
    "report": "make one page of result files",
    "sweep": "score a teacher over steps and guidance beside its students",
}
