"""Compare what the methods of `find_phases` make of one matrix of layer distances.

    python -m evaluation.recurrence.compare_phases --output_dir outputs/compare_phases \
        --distance tests/fixtures/dinov2_base_layer_distance.json --k 2 3 4

Takes seconds. Prints a Markdown table, and writes it as `comparison.json` and the partitions as
`partitions.png`. `--distance` also takes the phases.json of training/find_phases.py. A good
partition has near layers within its phases and distant ones between: a large contrast. With k = 3
on the published matrix: recursive and ncut 0.46, maxcut 0.36, random 0.35 ± 0.08, uniform 0.30.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import raptor_hf
from raptor_hf import phases, reports
from raptor_hf.runs.arguments import check_positive, parse_arguments
from raptor_hf.runs.files import write_json
from raptor_hf.runs.processes import run_program

MEASURES = ("cut_share", "within", "between", "contrast")


@dataclass
class Arguments:
    """Which matrix, which numbers of phases."""

    distance: str = field(metadata={"help": "JSON file with the key 'distance'"})
    output_dir: str = field(metadata={"help": "folder of comparison.json and partitions.png"})
    k: list[int] = field(default_factory=lambda: [2, 3, 4], metadata={"help": "numbers of phases"})
    random_draws: int = field(default=20, metadata={"help": "partitions of the method random"})

    def __post_init__(self):
        check_positive(self, "k")


def compare(distance: np.ndarray, k: int, method: str, draws: int) -> dict:
    """One row: the partitions of a method (several for random) and their qualities, a list each.

    `refused` says why recursive or ncut can't cut this matrix; the others always can.
    """
    row = {"method": method, "k": k, "phases": []}
    try:
        for seed in range(draws if method == "random" else 1):
            row["phases"].append(phases.find_phases(distance, k, method, seed=seed))
    except ValueError as error:
        if method not in ("recursive", "ncut"):
            raise
        row["refused"] = str(error)
    qualities = [phases.partition_quality(distance, lengths) for lengths in row["phases"]]
    return row | {name: [quality[name] for quality in qualities] for name in MEASURES}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        found = f"{len(row['phases'])} draws" if row["phases"][1:] else str(*row["phases"])
        # None: a partition without such a pair of layers
        values = [np.array([] if None in row[name] else row[name]) for name in MEASURES]
        cells = [row["method"], str(row["k"]), row.get("refused", found)]
        lines.append(cells + [reports.mean_std(value, 3) for value in values])
    heading = ["method", "k", "phases", "share cut", "within", "between", "contrast"]
    return reports.markdown_table(heading, lines)


def plot_partitions(rows: list[dict], path: Path) -> None:
    """The first partition of every row as a bar over the layers, one colour a phase."""
    rows = [row for row in rows if row["phases"]]
    size = (7, 0.8 + 0.28 * len(rows))
    figure, axes = raptor_hf.plotting.make_figure(figsize=size, layout="constrained")
    for y, row in enumerate(rows):
        start = 0.5
        for phase, length in enumerate(row["phases"][0]):
            axes.barh(y, length, left=start, color=f"C{phase}", edgecolor="white", height=0.85)
            start += length
    axes.set_yticks(range(len(rows)), [f"{row['method']}, k = {row['k']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="layer", xlim=(0.5, start), title="Phases by method (random: first draw)")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Cut with every method, measure, print, write; it is cheap and always made anew."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    distance, output_dir = phases.load_distance(arguments.distance), Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    draws = arguments.random_draws
    rows = [compare(distance, k, method, draws) for k in arguments.k for method in phases.METHODS]
    print(table(rows))
    write_json(output_dir / "comparison.json", {"distance": arguments.distance, "rows": rows})
    plot_partitions(rows, output_dir / "partitions.png")


if __name__ == "__main__":
    run_program(main, alone=True)
