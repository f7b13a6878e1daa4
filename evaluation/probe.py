"""Judge frozen backbones: a linear probe for each, and each Raptor's R² against the teacher.

    python evaluation/probe.py training/recipes/digits_probe.yaml --teacher outputs/digits/teacher \
        --models raptor_k3=outputs/digits/seed_0/raptor_k3 \
        --output_dir outputs/digits/seed_0/evaluation

Writes one JSON per (model, task) to results/, and every Raptor with its probe to classifiers/.
main() is long because all that it does to one model shares the data and the teacher.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf.data import ImageViews, load_images
from raptor_hf.heads import build_classifier, load_linear_head
from raptor_hf.loop import LoopArguments, remove_checkpoints
from raptor_hf.plan import print_probe_plan
from raptor_hf.probes import (
    extract_features,
    model_facts,
    probe_accuracy,
    train_linear_probe,
    trajectory_r2,
)  # fmt: skip
from raptor_hf.runs import (
    environment,
    file_digest,
    finish_run,
    folder_digest,
    parse_arguments,
    start_run,
    write_json,
)
from raptor_hf.teachers import load_backbone, load_processor


@dataclass
class Arguments(LoopArguments):
    """Which models to judge on which images, and the loop's arguments for the probe."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher; it is judged too"})
    models: list[str] = field(
        default_factory=list, metadata={"help": "Raptors and baselines, as name=folder"}
    )
    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    train_split: str = "train"
    test_split: str = "test"
    head: str | None = field(
        default=None,
        metadata={"help": "linear head (file, folder, Hub id) to start from; --steps 0 judges it"},
    )


def main() -> None:
    """Probe the teacher and every model, write the results."""
    arguments = parse_arguments(Arguments)
    folders = {
        "teacher": arguments.teacher,
        **dict(pair.split("=", 1) for pair in arguments.models),
    }
    if arguments.dry_run:
        return print_probe_plan(arguments, folders)
    inputs = {name: folder_digest(path) for name, path in folders.items() if Path(path).is_dir()}
    if arguments.head and Path(arguments.head).exists():
        digest = folder_digest if Path(arguments.head).is_dir() else file_digest
        inputs["head"] = digest(arguments.head)
    if start_run(arguments, inputs=inputs):
        return
    output_dir = Path(arguments.output_dir)
    (output_dir / "results").mkdir(exist_ok=True)
    teacher, processor = load_backbone(arguments.teacher), load_processor(arguments.teacher)
    train = load_images(arguments.dataset, arguments.train_split)
    test = load_images(arguments.dataset, arguments.test_split)
    names = train.features["label"].names
    train, test = ImageViews(train, processor), ImageViews(test, processor)

    def save(name: str, model, task: str, metrics: dict) -> None:
        result = {"model": name, "task": task, "seed": arguments.seed, "metrics": metrics}
        data = {
            "dataset": arguments.dataset,
            "split": arguments.test_split,
            "num_images": len(test),
        }
        facts = {**model_facts(model), "environment": environment()}
        write_json(output_dir / "results" / f"{name}_{task}.json", {**result, **data, **facts})

    for name, folder in folders.items():
        print(f"{name}: {folder}", flush=True)
        model = load_backbone(folder)
        probe_dir = output_dir / "probes" / name
        head = None
        if arguments.head:
            head, _ = load_linear_head(arguments.head, hidden_size=model.config.hidden_size)
        probe = train_linear_probe(
            extract_features(model, train), len(names),
            dataclasses.replace(arguments, output_dir=str(probe_dir)), head=head,
        )  # fmt: skip
        accuracy = probe_accuracy(probe, extract_features(model, test))
        save(name, model, "classification", {"accuracy": accuracy})
        if model_facts(model)["phases"]:  # a Raptor, not the teacher or a baseline
            save(name, model, "r2", trajectory_r2(model, teacher, test))
            classifier = build_classifier(model, probe, names)
            classifier.save_pretrained(output_dir / "classifiers" / name)
            processor.save_pretrained(output_dir / "classifiers" / name)
        remove_checkpoints(probe_dir)
    finish_run(output_dir)


if __name__ == "__main__":
    main()
