"""What accuracy Raptors keep when they stop early: accuracy against applications, three ways.

    python evaluation/early_exit.py --dataset digits --output_dir outputs/digits/seed_0/early_exit \
        --models raptor_k3=outputs/digits/seed_0/classification/models/raptor_k3

Takes classifiers (evaluation/probe.py writes them to models/), seconds for the digits. The angle
and the numbers of applications that cost at most 1 % are chosen on images of the training split
and judged on the test split; evaluation/report.py draws the curves.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from raptor_hf.activations.online import choose_images
from raptor_hf.data import ImageViews, load_images
from raptor_hf.distillation.provenance import model_facts
from raptor_hf.probes.early_exit import judge_early_exit
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import require_one_process, run_program
from raptor_hf.teachers import load_processor


@dataclass(kw_only=True)
class Arguments:
    """Which classifiers, on which images."""

    models: list[str] = field(metadata={"help": "Raptors that classify, as name=folder"})
    dataset: str = field(metadata={"help": "digits, an image folder or a Hub id, with labels"})
    output_dir: str = field(metadata={"help": "folder of results/, a JSON a model"})
    train_split: str = field(default="train", metadata={"help": "images to choose on"})
    test_split: str = field(default="test", metadata={"help": "images to judge on"})
    train_images: int = field(default=2000, metadata={"help": "at most, chosen at random"})
    seed: int = field(default=0, metadata={"help": "of the models, for the report"})
    resume: bool = field(default=False, metadata={"help": "leave a finished run as it is"})


def main() -> None:
    """Judge every model, write the results."""
    require_one_process()
    arguments = parse_arguments(Arguments)
    folders = dict(pair.split("=", 1) for pair in arguments.models if "=" in pair)
    if len(folders) != len(arguments.models):
        raise ValueError(f"--models takes NAME=FOLDER, each name once; got {arguments.models}.")
    inputs = {name: folder_digest(path) for name, path in folders.items() if Path(path).is_dir()}
    if start_run(arguments, inputs=inputs):
        return
    results = Path(arguments.output_dir) / "results"
    results.mkdir(exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = load_images(arguments.dataset, arguments.train_split)
    test = load_images(arguments.dataset, arguments.test_split)
    chosen = choose_images(len(train), min(len(train), arguments.train_images), 0)
    for name, folder in folders.items():
        model = AutoModelForImageClassification.from_pretrained(folder).to(device).eval()
        processor = load_processor(folder)
        images = ImageViews(test, processor)
        metrics = judge_early_exit(model, ImageViews(train, processor, image_ids=chosen), images)
        result = {"model": name, "task": "early_exit", "seed": arguments.seed, "metrics": metrics}
        result |= {**model_facts(model.raptor), "dataset": public_name(arguments.dataset)}
        result |= {"split": arguments.test_split, "num_images": len(images)}
        write_json(results / f"{name}_early_exit.json", {**result, "environment": environment()})
        for kind, point in metrics["chosen"].items():
            print(
                f"{name}, {kind}: {100 * point['saved']:.0f} % of the applications saved for "
                f"{100 * point['lost']:.1f} % of accuracy"
            )
    finish_run(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)
