"""The rows of ``fastdiff certify --json`` over several seeds as one Markdown table: mean, smallest and largest value.

fastdiff certify --seed 0 1 2 --json docs/results/certificates.json
python eval/certificates.py docs/results/certificates.json
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["law"], row["metric"]


def main(files: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    rows = [row for file in files for row in json.loads(file.read_text())]
    print("| method | law | metric | mean (range) | bound | teacher, as many calls | exact samples | seconds | passed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (method, law, metric), group in groupby(sorted(rows, key=key), key):
        seeds = list(group)
        values = [row["value"] for row in seeds]
        mean = {name: sum(row[name] for row in seeds) / len(seeds) for name in ("baseline", "floor", "seconds")}
        print(
            f"| `{method}` | {law} | {metric} | {sum(values) / len(values):.3f} ({min(values):.3f} .. {max(values):.3f}) "
            f"| {seeds[0]['bound']} | {mean['baseline']:.3f} | {mean['floor']:.3f} | {mean['seconds']:.0f} "
            f"| {sum(row['pass'] for row in seeds)} of {len(seeds)} |"
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
