"""Publish a model, or an activation dataset, on the Hugging Face Hub. Log in first: hf auth login.

python model_cards/publish.py --model outputs/digits/seed_0/classification/models/raptor_k3 \
        --results outputs/digits/seed_0/classification/results --repo_id NAME/raptor_k3 --dry_run
python model_cards/publish.py --activations outputs/digits/activations --repo_id NAME/states

A model's card is rendered, its snippet run, and the folder loaded again without this package and
compared; only then it is pushed. `--dry_run` stops there and leaves the folder to look at.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf import hub, reports
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import size
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
    license: str = field(
        default="apache-2.0",
        metadata={"help": "of a model's weights: its teacher's"},
    )
    private: bool = field(default=False, metadata={"help": "only its owner sees the repository"})
    dry_run: bool = field(default=False, metadata={"help": "write and try, but push nothing"})
    output_dir: str | None = field(
        default=None, metadata={"help": "of a dry run; default: outputs/hub/<name of the repo>"}
    )


def main() -> None:
    """Check, write, try; push unless it is a dry run."""
    (arguments,) = parse_arguments(Arguments)
    if bool(arguments.model) == bool(arguments.activations):
        raise ValueError("Publish what? Give either --model FOLDER or --activations FOLDER.")
    if bool(arguments.model) != bool(arguments.results):
        raise ValueError("--results FOLDER belongs to --model: it is published with its figures.")
    if arguments.output_dir and not arguments.dry_run:
        raise ValueError("--output_dir is for --dry_run: otherwise nothing is left here.")
    name = arguments.repo_id.split("/")[-1]
    dry = Path(arguments.output_dir or f"outputs/hub/{name}")
    if arguments.activations:
        return activations(arguments, dry)
    with tempfile.TemporaryDirectory() as scratch:
        folder = dry if arguments.dry_run else Path(scratch) / name
        results = reports.load_results(arguments.results)
        hub.stage_model(
            arguments.model, folder, results, TEMPLATE,
            title=arguments.repo_id, license=arguments.license,
        )  # fmt: skip
        print("tried:   the card's snippet runs; loaded without raptor_hf, the outputs are equal")
        for file in sorted(folder.iterdir()):
            print(f"file:    {file.name} ({size(file.stat().st_size)})")
        if arguments.dry_run:
            print(f"folder:  {folder} (nothing was pushed)")
            return
        commit = hub.publish_model(folder, arguments.repo_id, private=arguments.private)
    print(f"model:   {arguments.repo_id}, to be loaded with revision {commit}")


def activations(arguments: Arguments, dry: Path) -> None:
    """Check a dataset and push it, or write the folder of a dry run."""
    files = hub.activation_files(arguments.activations)
    total = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in files.values())
    print(f"checked: {len(files)} files, {size(total)}")
    if arguments.dry_run:
        hub.write_files(files, dry)
        print(f"folder:  {dry} (shards are links; nothing was pushed)")
        return
    commit = hub.publish_activations(files, arguments.repo_id, private=arguments.private)
    print(f"dataset: {arguments.repo_id}, revision {commit}")


if __name__ == "__main__":
    run_program(main, alone=True)
