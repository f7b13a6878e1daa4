"""Compare the partitions of all methods of `find_phases` on one matrix of layer distances.

    python -m evaluation.recurrence.compare_phases --output_dir outputs/compare_phases \
        --distance tests/fixtures/dinov2_base_layer_distance.json --k 2 3 4

Takes seconds. Prints a Markdown table, and writes `comparison.json`. `--distance` also takes the
phases.json of training/find_phases.py. A good partition has near layers within its phases and
distant ones between: a large contrast. With k = 3 on the published matrix: recursive and ncut 0.46,
maxcut 0.36, random 0.35 ± 0.08, uniform 0.30.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raptor_hf import phases
from raptor_hf.reports.tables import markdown_table, mean_std
from raptor_hf.runs.arguments import check_positive, parse_arguments
from raptor_hf.runs.files import write_json
from raptor_hf.runs.processes import run_program

MEASURES = ("cut_share", "within", "between", "contrast")
RANDOM_DRAWS = 20


@dataclass
class Arguments:
    """Which matrix, which numbers of phases."""

    distance: str = field(metadata={"help": "JSON file with the key 'distance'"})
    output_dir: str = field(metadata={"help": "folder of comparison.json"})
    k: list[int] = field(default_factory=lambda: [2, 3, 4], metadata={"help": "numbers of phases"})

    def __post_init__(self):
        check_positive(self, "k")


def compare(distance: np.ndarray, k: int, method: str) -> dict:
    """Return the partitions of a method, several of the random one, and lists of their qualities.

    `refused` says why recursive or ncut can't cut this matrix; the others always can.
    """
    row = {"method": method, "k": k, "phases": []}
    try:
        for seed in range(RANDOM_DRAWS if method == "random" else 1):
            row["phases"].append(phases.find_phases(distance, k, method, seed=seed))
    except ValueError as error:
        if method not in ("recursive", "ncut"):
            raise
        row["refused"] = str(error)
    qualities = [phases.partition_quality(distance, lengths) for lengths in row["phases"]]
    return row | {name: [quality[name] for quality in qualities] for name in MEASURES}


def comparison_table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = []
    for row in rows:
        partition = row.get("refused", str(*row["phases"][:1]))
        if len(row["phases"]) > 1:
            partition = f"{len(row['phases'])} draws"
        cells = [row["method"], str(row["k"]), partition]
        for name in MEASURES:  # None: a partition without such a pair of layers
            values = [] if None in row[name] else row[name]
            cells.append(mean_std(np.array(values), 3))
        lines.append(cells)
    heading = ["method", "k", "phases", "share cut", "within", "between", "contrast"]
    return markdown_table(heading, lines)


def main(argv: list[str] | None = None) -> None:
    """Cut with every method, measure, print, write; it is cheap and always made anew."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    distance = phases.load_distance(arguments.distance)
    rows = []
    for k in arguments.k:
        for method in phases.METHODS:
            rows.append(compare(distance, k, method))
    print(comparison_table(rows))
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", {"distance": arguments.distance, "rows": rows})


if __name__ == "__main__":
    run_program(main, alone=True)
