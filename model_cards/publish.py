"""Publish a model or an activation dataset on the Hugging Face Hub. Log in first: hf auth login.

python model_cards/publish.py --model outputs/digits/seed_0/classification/models/raptor_k3 \
        --results outputs/digits/seed_0/classification/results --repo_id NAME/raptor_k3 --dry_run
python model_cards/publish.py --activations outputs/digits/activations --repo_id NAME/states
python model_cards/publish.py --space outputs/digits/seed_0/classification/models/raptor_k3 \
        --repo_id NAME/page

The card of a model is rendered and its snippet run without this package before anything is
uploaded. `--dry_run` stops there: the card lies beside the weights.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id, yaml_dump

from raptor_hf import hub, reports
from raptor_hf.hub.publishing import upload_files
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.processes import run_program

TEMPLATE = Path(__file__).parent / "template.md"
PAGE = Path(__file__).parent.parent / "evaluation" / "demo"
PAGE_FILES = ["index.html", "page.js", "style.css", "sample.jpg"]
PAGE_FILES += ["node_modules/@huggingface/transformers/dist/transformers.web.min.js"]
PAGE_FILES += [f"node_modules/onnxruntime-web/dist/{name}" for name in (
    "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
)]  # fmt: skip
SHOWN = ["config.json", "preprocessor_config.json", "onnx/states_q4f16.onnx"]
# the headers let the page compute in several threads
SPACE_CARD = """---
title: A Raptor, layer by layer
sdk: static
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---
"""


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
    space: str | None = field(
        default=None, metadata={"help": "folder of a Raptor to show in a static Space"}
    )
    license: str | None = field(
        default=None, metadata={"help": "of a model's weights, such as apache-2.0: its teacher's"}
    )
    private: bool = field(default=False, metadata={"help": "only its owner sees the repository"})
    dry_run: bool = field(default=False, metadata={"help": "check, but upload nothing"})


def write_eval_results(card: Path) -> None:
    """Write a card's figure of its task as `.eval_results/probe.yaml`, for leaderboards of the Hub.

    Only datasets of the Hub have one. docs/hub.md says more.
    """
    file = card.parent / ".eval_results" / "probe.yaml"
    file.unlink(missing_ok=True)
    figure = ModelCard.load(card).data.eval_results[0]
    if "/" in figure.dataset_name:
        dataset = {"id": figure.dataset_name, "task_id": "default"}
        notes = f"{figure.metric_type} of a linear head on frozen tokens, {figure.dataset_split}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            yaml_dump([{"dataset": dataset, "value": figure.metric_value, "notes": notes}])
        )


def make_site(folder: Path, models: dict[str, Path]) -> None:
    """Link the page of `evaluation/demo`, what it runs on, and models by name into a folder.

    Raises:
        FileNotFoundError: no file of the states, or no transformers.js beside the page.
    """
    files = {name: PAGE / name for name in PAGE_FILES}
    for name, model in models.items():
        others = [f"onnx/{file.name}" for file in (model / "onnx").glob("states*.onnx")]
        files |= {f"{name}/{file}": model / file for file in (*SHOWN, *others)}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"A page needs {', '.join(missing)}: run model_cards/export.py --states, and npm "
            "install --ignore-scripts in evaluation/demo."
        )
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.resolve())


def publish_space(model: Path, repo_id: str, *, private: bool) -> str:
    """Upload the page with a model as a static Space; return the commit."""
    with tempfile.TemporaryDirectory() as folder:
        make_site(Path(folder), {"model": model})
        (Path(folder) / "README.md").write_text(SPACE_CARD)
        return upload_files(folder, repo_id, ["**/*"], repo_type="space", private=private)


def main(argv: list[str] | None = None) -> None:
    """Check, write the card, and upload unless it is a dry run."""
    # a model with results, or a dataset
    (arguments,) = parse_arguments(Arguments, argv=argv)
    repo_id = arguments.repo_id
    validate_repo_id(repo_id)
    if sum(map(bool, (arguments.model, arguments.activations, arguments.space))) != 1:
        raise ValueError("Give one of --model, --activations and --space, each with a FOLDER.")
    if bool(arguments.model) != bool(arguments.results):
        raise ValueError("--results FOLDER belongs to --model: its card shows them.")

    # a page, or a dataset
    if arguments.dry_run and not arguments.model:
        raise ValueError(
            "--dry_run is for --model. Check a dataset with python -m raptor_hf.activations verify."
        )
    if arguments.space:
        commit = publish_space(Path(arguments.space), repo_id, private=arguments.private)
        print(f"space:   {repo_id}, revision {commit}")
        return
    if arguments.activations:
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
    write_eval_results(card)
    print(f"card:    {card}; its snippet runs without raptor_hf")
    if not arguments.dry_run:
        commit = hub.publish_model(arguments.model, repo_id, private=arguments.private)
        print(f"model:   {repo_id}, revision {commit}")


if __name__ == "__main__":
    run_program(main, alone=True)
