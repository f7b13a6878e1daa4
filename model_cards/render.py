"""Write model cards: of finished models, whose usage snippet is run before, and of planned ones.

python model_cards/render.py --results outputs/digits/seed_0/classification/results \
        --models outputs/digits/seed_0/classification/models/raptor_k3
python model_cards/render.py --recipes training/recipes/imagenet_raptor_k3.yaml \
        --output_dir model_cards/imagenet
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf import hub, reports
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import read_json
from raptor_hf.runs.processes import run_program

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "evaluation" / "results" / "published.json"


@dataclass
class Arguments:
    """Which models, and the results to tell of; or recipes that nobody has run."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "folders of models to write a card into"}
    )
    results: list[str] = field(default_factory=list, metadata={"help": "folders with result files"})
    title: str | None = field(
        default=None, metadata={"help": "what the card calls the model; default: its folder's name"}
    )
    recipes: list[str] = field(
        default_factory=list, metadata={"help": "recipes of models that nobody has trained yet"}
    )
    output_dir: str = field(default="model_cards", metadata={"help": "for the cards of recipes"})


def main() -> None:
    """Write every card and say where."""
    (arguments,) = parse_arguments(Arguments)
    if bool(arguments.models) != bool(arguments.results) or not (
        arguments.models or arguments.recipes
    ):
        raise ValueError("Give --models with --results, or --recipes.")
    if arguments.title and len(arguments.models) != 1:
        raise ValueError(f"--title is for one model; got {len(arguments.models)}.")
    results = reports.load_results(arguments.results) if arguments.results else []
    template = HERE / "template.md"
    for model in arguments.models:
        print(f"model:   {model}")
        print(f"card:    {hub.write_model_card(model, results, template, title=arguments.title)}")
    for recipe in arguments.recipes:
        card = hub.planned_card(recipe, read_json(PUBLISHED), HERE / "planned.md")
        path = Path(arguments.output_dir) / f"{Path(recipe).stem}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        card.save(path)
        print(f"card:    {path}")


if __name__ == "__main__":
    run_program(main, alone=True)
