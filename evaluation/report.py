"""Tables and figures of all seeds as a Markdown report.

python evaluation/report.py --results outputs/digits/seed_*/evaluation/results \
        --phases outputs/digits/phases --output_dir outputs/digits/report
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf.report import load_results, write_report
from raptor_hf.runs import parse_arguments


@dataclass
class Arguments:
    """Where the results lie, and where the report goes."""

    results: list[str] = field(metadata={"help": "folders with result files"})
    output_dir: str = field(metadata={"help": "folder of report.md and its figures"})
    phases: str | None = field(default=None, metadata={"help": "folder of find_phases.py"})
    pair: list[str] = field(
        default_factory=list, metadata={"help": "two models that differ in their start only"}
    )


def main() -> None:
    """Read, write, print the table; a report is cheap and always made anew."""
    arguments = parse_arguments(Arguments)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.phases:
        shutil.copy(Path(arguments.phases) / "layer_distance.png", output_dir)
    results = load_results(arguments.results)
    print(write_report(results, output_dir, pair=tuple(arguments.pair) or None))
    print(f"\nreport:  {output_dir / 'report.md'}\nfigures: {output_dir}/*.png")


if __name__ == "__main__":
    main()
