"""Write the cards of finished models beside their weights, after running their usage snippets.

python model_cards/render.py --results outputs/digits/seed_0/classification/results \
        --models outputs/digits/seed_0/classification/models/raptor_k3
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf import hub, reports
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.processes import run_program

TEMPLATE = Path(__file__).parent / "template.md"


@dataclass(kw_only=True)
class Arguments:
    """Models, and the results that their cards show."""

    models: list[str] = field(metadata={"help": "folders of models to write a card into"})
    results: list[str] = field(metadata={"help": "folders with result files"})


def main(argv: list[str] | None = None) -> None:
    """Write every card and print where."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    results = reports.load_results(arguments.results)
    for model in arguments.models:
        print(f"model:   {model}")
        hub.write_model_card(model, results, TEMPLATE)
        print(f"card:    {Path(model) / 'README.md'}")


if __name__ == "__main__":
    run_program(main, alone=True)
