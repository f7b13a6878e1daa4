"""Write the model cards of finished models: rendered from results, the usage snippet run before.

python model_cards/render.py --results outputs/digits/seed_0/classification/results \
        --models outputs/digits/seed_0/classification/models/raptor_k3
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf.launch import run_program
from raptor_hf.model_card import write_model_card
from raptor_hf.runs import parse_arguments
from raptor_hf.tables import load_results


@dataclass
class Arguments:
    """Which models, and the results to tell of."""

    models: list[str] = field(metadata={"help": "folders of models to write a card into"})
    results: list[str] = field(metadata={"help": "folders with result files"})
    teacher: str = field(default="the digits teacher", metadata={"help": "name of the teacher"})


def main() -> None:
    """Write every card and say where."""
    arguments = parse_arguments(Arguments)
    results = load_results(arguments.results)
    template = Path(__file__).parent / "template.md"
    for model in arguments.models:
        print(f"model:   {model}")
        print(f"card:    {write_model_card(model, results, template, teacher=arguments.teacher)}")


if __name__ == "__main__":
    run_program(main, alone=True)
