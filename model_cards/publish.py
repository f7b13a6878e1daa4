"""Publish a model or an activation dataset on the Hugging Face Hub. Log in first: hf auth login.

python model_cards/publish.py --model outputs/digits/seed_0/classification/models/raptor_k3 \
        --results outputs/digits/seed_0/classification/results --repo_id NAME/raptor_k3 --dry_run
python model_cards/publish.py --activations outputs/digits/activations --repo_id NAME/states

The card of a model is rendered and its snippet run without this package before anything is
uploaded. `--dry_run` stops there: the card lies beside the weights.
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from raptor_hf import hub, reports
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.processes import run_program

TEMPLATE = Path(__file__).parent / "template.md"


@dataclass(kw_only=True)
class Arguments:
    """What to publish, and where."""

    repo_id: str = field(metadata={"help": "repository on the Hub: NAME/model"})
    model: str | None = field(
        default=None, metadata={"help": "folder of a Raptor with a head, as probe.py saves it"}
    )
    results: list[str] = field(
        default_factory=list, metadata={"help": "folders with the model's result files"}
    )
    activations: str | None = field(
        default=None, metadata={"help": "folder of an activation dataset"}
    )
    license: str | None = field(
        default=None, metadata={"help": "of a model's weights, such as apache-2.0: its teacher's"}
    )
    private: bool = field(default=False, metadata={"help": "only its owner sees the repository"})
    dry_run: bool = field(default=False, metadata={"help": "check, but upload nothing"})


def main(argv: list[str] | None = None) -> None:
    """Check, write the card, and upload unless it is a dry run."""
    # a model with results, or a dataset
    (arguments,) = parse_arguments(Arguments, argv=argv)
    repo_id = arguments.repo_id
    validate_repo_id(repo_id)
    if bool(arguments.model) == bool(arguments.activations):
        raise ValueError("Give either --model FOLDER or --activations FOLDER.")
    if bool(arguments.model) != bool(arguments.results):
        raise ValueError("--results FOLDER belongs to --model: its card shows them.")

    # a dataset
    if arguments.activations:
        if arguments.dry_run:
            raise ValueError(
                "--dry_run is for --model. Check a dataset with python -m raptor_hf.activations "
                f"verify {arguments.activations}."
            )
        commit = hub.publish_activations(arguments.activations, repo_id, private=arguments.private)
        print(f"dataset: {repo_id}, revision {commit}")
        return

    # a model: its card first
    card = hub.write_model_card(
        arguments.model,
        reports.load_results(arguments.results),
        TEMPLATE,
        repo_id=repo_id,
        license=arguments.license,
    )
    print(f"card:    {card}; its snippet runs without raptor_hf")
    if not arguments.dry_run:
        commit = hub.publish_model(arguments.model, repo_id, private=arguments.private)
        print(f"model:   {repo_id}, revision {commit}")


if __name__ == "__main__":
    run_program(main, alone=True)
