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


def main() -> None:
    """Judge every model, write the results."""
    arguments, reading = parse_arguments(*PARTS)
    require_one_process()
    folders = named_folders("--models", arguments.models)
    if arguments.dry_run:
        reads = [
            dry_runs.describe_images(arguments.dataset, split, reading, at_most=at_most)
            for split, at_most in (
                (arguments.train_split, arguments.train_images),
                (arguments.test_split, None),
            )
        ]
        return dry_runs.print_study_plan("Exit early", folders, reads, arguments.output_dir)
    inputs = {name: folder_digest(path) for name, path in folders.items() if Path(path).is_dir()}
    train = raptor_hf.data.load_images(arguments.dataset, arguments.train_split, reading)
    test = raptor_hf.data.load_images(arguments.dataset, arguments.test_split, reading)
    read = {
        name: raptor_hf.data.list_images(arguments.dataset, images)
        for name, images in (("train_images", train), ("test_images", test))
    }
    if start_run(arguments, reading, inputs=inputs, images=read):
        return
    results = Path(arguments.output_dir) / "results"
    results.mkdir(exist_ok=True)
    chosen = raptor_hf.data.choose_images(len(train), min(len(train), arguments.train_images), 0)
    for name, folder in folders.items():
        model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        model.to(process_state().device).eval()
        processor = raptor_hf.teachers.load_processor(folder)
        images, chosen_on = (
            raptor_hf.data.ImageViews(
                split, processor, image_ids=ids, reading=reading
            ).drop_unreadable()
            for split, ids in ((test, None), (train, chosen))
        )
        if not images.classes.number:
            raise ValueError(f"{arguments.dataset} has no labels: accuracy needs some.")
        names = list(model.config.id2label.values())
        tasks.arrange_head(model.classifier, names, images.classes, source=folder)
        metrics = probes.evaluate_early_exit(model, chosen_on, images)
        result = {"model": name, "task": "early_exit", "seed": arguments.seed, "metrics": metrics}
        result |= {
            **distillation.model_facts(model.raptor),
            "dataset": public_name(arguments.dataset),
        }
        result |= {"split": arguments.test_split, "num_images": len(images)}
        result |= {"images_sha256": read["test_images"].content_digest}
        write_json(results / f"{name}_early_exit.json", {**result, "environment": environment()})
        for kind, point in metrics["chosen"].items():
            print(
                f"{name}, {kind}: {100 * point['saved']:.0f} % of the applications saved for "
                f"{100 * point['lost']:.1f} % of accuracy"
            )
    finish_run(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)
