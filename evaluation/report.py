"""Tables and figures of all seeds as a Markdown report.

    python evaluation/report.py --results outputs/digits/seed_*/*/results \
        --phases outputs/digits/phases --output_dir outputs/digits/report

It is made from result files alone, those in git too: `--results evaluation/results/digits`.
`--ablation` shows that of `training/ablate.sh` beside the paper's.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf import reports
from raptor_hf.reports.report import ablation_section
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import read_json
from raptor_hf.runs.processes import run_program

PUBLISHED = Path(__file__).parent / "results" / "published.json"


@dataclass
class Arguments:
    """Where the results lie, and where the report goes."""

    results: list[str] = field(metadata={"help": "folders with result files"})
    output_dir: str = field(metadata={"help": "folder of report.md and its figures"})
    phases: str | None = field(default=None, metadata={"help": "folder of find_phases.py"})
    ablation: str | None = field(default=None, metadata={"help": "folder of training/ablate.sh"})


def main(argv: list[str] | None = None) -> None:
    """Read, write, print the table; a report is cheap and always made anew."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.phases:
        shutil.copy(Path(arguments.phases) / "layer_distance.png", output_dir)
    # pictures of predictions: where several seeds have one, the first wins
    for folder in reversed(arguments.results):
        for picture in Path(folder).glob("*.png"):
            if picture.parent.resolve() != output_dir.resolve():
                shutil.copy(picture, output_dir)
    ablation = []
    if arguments.ablation:
        ablation = ablation_section(arguments.ablation, read_json(PUBLISHED))
    table = reports.write_report(
        reports.load_results(arguments.results),
        output_dir,
        ablation=ablation,
    )
    print(table)
    print(f"\nreport:  {output_dir / 'report.md'}\nfigures: {output_dir}/*.png")


if __name__ == "__main__":
    run_program(main, alone=True)
