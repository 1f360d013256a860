"""T2I-CompBench: attributes, spatial and other relations, numbers, and all of them together.

    <folder>/samples/<prompt>_000000.png   ten images a prompt, numbered over the whole file

(Huang et al., "T2I-CompBench: a comprehensive benchmark for open-world compositional text-to-image generation", NeurIPS 2023
datasets and benchmarks, arXiv:2307.06350.) Layout read in ``Karine-Huang/T2I-CompBench``: ``GORS_finetune/inference_eval.py``
(names, ten images, the part of a line before a tab); ``BLIPvqa_eval/BLIP_vqa.py``, ``CLIPScore_eval/CLIP_similarity.py``,
``UniDet_eval/2D_spatial_eval.py`` and ``numeracy_eval.py`` (prompt = name up to the first underscore, key = the number behind the
last); ``3_in_1_eval/3_in_1.py`` (ten images a line of ``complex_val.txt``, in its order). One folder holds one prompts' file.
"""

from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.eval.exporters.plan import Piece, Plan, digest, file_name, read_text

NAME = "T2I-CompBench"


def t2i_compbench(source: str | Path, *, per_prompt: int = 10) -> Plan:
    """The plan of one of their ``*_val.txt``.

    Args:
        per_prompt: 10; ``3_in_1.py`` counts on it, the other scorers take any.

    Raises:
        UserError: a line is empty, or no scorer would read its prompt whole off a file name.
    """
    text = read_text(source, f"one of {NAME}'s *_val.txt, one prompt a line")
    pieces = []
    for number, line in enumerate(text.splitlines()):
        prompt = line.split("\t")[0]
        if "_" in prompt:
            raise UserError(f"line {number + 1} of {source}: {NAME} cuts prompts at the first underscore, as in {prompt!r}.")
        for index in range(number * per_prompt, (number + 1) * per_prompt):
            pieces.append(Piece(f"samples/{file_name(prompt, f'_{index:06}.png', benchmark=NAME)}", prompt, (index,)))
    return Plan(benchmark=NAME, source_sha256=digest(text), per_prompt=per_prompt, pieces=pieces)
