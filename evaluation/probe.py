"""Judge frozen backbones: a linear probe of one task for each, and each Raptor's R².

    accelerate launch evaluation/probe.py training/recipes/digits_segmentation_probe.yaml \
        --teacher outputs/digits/teacher --models raptor_k3=outputs/digits/seed_0/raptor_k3 \
        --output_dir outputs/digits/seed_0/segmentation

Writes one JSON per model to results/, every Raptor with its head to models/, and for dense tasks a
picture of some predictions.
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf.evaluation import Evaluation
from raptor_hf.plan import print_probe_plan
from raptor_hf.probe_arguments import ProbeArguments
from raptor_hf.runs import file_digest, finish_run, folder_digest, parse_arguments, start_run


@dataclass(kw_only=True)
class Arguments(ProbeArguments):
    """Which models to judge, and the recipe of the task."""

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher; it is judged too"})
    models: list[str] = field(
        default_factory=list, metadata={"help": "Raptors and baselines, as name=folder"}
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
    evaluation = Evaluation(arguments, arguments.teacher)
    for name, folder in folders.items():
        evaluation.judge(name, folder)
    picture = evaluation.draw_predictions(list(folders))
    if picture:
        print(f"predictions: {picture}")
    finish_run(arguments.output_dir)


if __name__ == "__main__":
    main()
