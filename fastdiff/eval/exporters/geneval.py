"""GenEval: are the named objects there, as many, in those colours, at those places?

    <folder>/00000/metadata.jsonl     line 0 of evaluation_metadata.jsonl
    <folder>/00000/samples/0000.png   to 0003.png, four images of its prompt

(Ghosh et al., "GenEval: an object-focused framework for evaluating text-to-image alignment", NeurIPS 2023 datasets and
benchmarks, arXiv:2310.11513.) Layout read in ``README.md`` and ``evaluation/evaluate_images.py`` of ``djghosh13/geneval``: the
scorer walks all-digit folders, opens every ``samples/<digits>.png``, and takes ``tag`` and ``prompt`` from the metadata.
"""

import json
from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.eval.exporters.plan import Piece, Plan, digest, read_text


def geneval(source: str | Path, *, per_prompt: int = 4) -> Plan:
    """The plan of a GenEval prompts' file.

    Args:
        source: their ``prompts/evaluation_metadata.jsonl``, one object a line with ``prompt``, ``tag`` and what must be seen.

    Raises:
        UserError: a line is no such object.
    """
    text = read_text(source, "GenEval's prompts/evaluation_metadata.jsonl")
    pieces, texts = [], {}
    for number, line in enumerate(text.splitlines()):
        try:
            entry = json.loads(line)
            prompt, _ = entry["prompt"], entry["tag"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"line {number + 1} of {source} is no GenEval entry with prompt and tag: {line[:80]!r}.") from error
        texts[f"{number:05}/metadata.jsonl"] = json.dumps(entry)
        for k in range(per_prompt):
            pieces.append(Piece(f"{number:05}/samples/{k:04}.png", prompt, (number * per_prompt + k,)))
    return Plan(benchmark="GenEval", source_sha256=digest(text), per_prompt=per_prompt, pieces=pieces, texts=texts)
