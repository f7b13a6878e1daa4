"""What accuracy Raptors keep when they stop early: accuracy against applications, three ways.

    python evaluation/early_exit.py --dataset digits --output_dir outputs/digits/seed_0/early_exit \
        --models raptor_k3=outputs/digits/seed_0/classification/models/raptor_k3

Takes classifiers (evaluation/probe.py writes them to models/), seconds for the digits. The angle
and the numbers of applications that cost at most 1 % are chosen on images of the training split
and judged on the test split; evaluation/report.py draws the curves.
"""

from dataclasses import dataclass, field
from pathlib import Path

import transformers

import raptor_hf
from raptor_hf import distillation, dry_runs, probes, tasks
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import (
    Checked,
    NonNegative,
    Positive,
    Watching,
    named_folders,
    parse_arguments,
)
from raptor_hf.runs.files import folder_digest, public_name, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import process_state, require_one_process, run_program


@dataclass(kw_only=True)
class Arguments(Checked):
    """Which classifiers, on which images."""

    models: list[str] = field(metadata={"help": "Raptors that classify, as NAME=FOLDER"})
    dataset: str = field(metadata={"help": "digits, an image folder or a Hub id, with labels"})
    output_dir: Watching[str] = field(metadata={"help": "folder of results/, a JSON a model"})
    train_split: str = field(default="train", metadata={"help": "images to choose on"})
    test_split: str = field(default="test", metadata={"help": "images to judge on"})
    train_images: Positive[int] = field(
        default=2000, metadata={"help": "at most, chosen at random"}
    )
    seed: NonNegative[int] = field(default=0, metadata={"help": "of the models, for the report"})
    resume: Watching[bool] = field(
        default=False, metadata={"help": "leave a finished run as it is"}
    )
    dry_run: Watching[bool] = field(
        default=False, metadata={"help": "print what would be read and written; do nothing"}
    )


PARTS = (Arguments, ReadingArguments)


def evaluate(folder: str, train, test, own: Arguments, reading: ReadingArguments) -> dict:
    """What a model scores with fewer applications, chosen on some images of the training split."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    model.to(process_state().device).eval()
    processor = raptor_hf.teachers.load_processor(folder, resolution=reading.resolution)
    chosen = raptor_hf.data.choose_images(len(train), min(len(train), own.train_images), 0)
    images, chosen_on = (
        raptor_hf.data.ImageViews(split, processor, image_ids=ids, reading=reading)
        for split, ids in ((test, None), (train, chosen))
    )
    if not images.classes.number:
        raise ValueError(f"{own.dataset} has no labels: accuracy needs some.")
    if images.class_names != chosen_on.class_names:
        raise ValueError(
            f"{own.dataset}: the splits {own.train_split!r} and {own.test_split!r} must have the "
            "same classes in the same order."
        )
    names = list(model.config.id2label.values())
    tasks.arrange_head(model.classifier, names, images.classes, source=folder)
    metrics = probes.evaluate_early_exit(
        model,
        raptor_hf.data.views.drop_unreadable(chosen_on),
        raptor_hf.data.views.drop_unreadable(images),
    )
    result = {"task": "early_exit", "seed": own.seed, "metrics": metrics}
    result |= distillation.model_facts(model.raptor)
    result |= {"dataset": public_name(own.dataset), "split": own.test_split}
    return result | {"num_images": len(images)}


def main() -> None:
    """Evaluate every model, write the results."""
    own, reading = parse_arguments(*PARTS)
    require_one_process()
    folders = named_folders("--models", own.models)
    if own.dry_run:
        reads = [
            dry_runs.describe_images(own.dataset, own.train_split, at_most=own.train_images),
            dry_runs.describe_images(own.dataset, own.test_split),
        ]
        return dry_runs.print_study_plan("Exit early", folders, reads, own.output_dir)
    inputs = {name: folder_digest(path) for name, path in folders.items() if Path(path).is_dir()}
    train = raptor_hf.data.load_images(own.dataset, own.train_split, reading)
    test = raptor_hf.data.load_images(own.dataset, own.test_split, reading)
    read = {
        name: raptor_hf.data.list_images(own.dataset, images)
        for name, images in (("train_images", train), ("test_images", test))
    }
    if start_run(own, reading, inputs=inputs, images=read):
        return
    results = Path(own.output_dir) / "results"
    results.mkdir(exist_ok=True)
    facts = {"images_sha256": read["test_images"].content_digest, "environment": environment()}
    for name, folder in folders.items():
        result = {"model": name, **evaluate(folder, train, test, own, reading), **facts}
        write_json(results / f"{name}_early_exit.json", result)
        for kind, point in result["metrics"]["chosen"].items():
            print(
                f"{name}, {kind}: {100 * point['saved']:.0f} % of the applications saved for "
                f"{100 * point['lost']:.1f} % of accuracy"
            )
    finish_run(own.output_dir)


if __name__ == "__main__":
    run_program(main)
