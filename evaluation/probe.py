"""Judge frozen backbones: a linear probe of one task for each, and each Raptor's R².

    accelerate launch evaluation/probe.py training/recipes/digits_segmentation_probe.yaml \
        --teacher outputs/digits/teacher --models raptor_k3=outputs/digits/seed_0/raptor_k3 \
        --output_dir outputs/digits/seed_0/segmentation

Writes one JSON per model to results/, every Raptor with its head to models/, and for dense tasks a
picture of some predictions.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from raptor_hf.dry_runs.plans import print_probe_plan
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.probes.judge import Evaluation
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import file_digest, folder_digest
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import run_program


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
    folders = {"teacher": arguments.teacher}
    for pair in arguments.models:
        name, _, folder = pair.partition("=")
        if not folder or name in folders or name == "constant":
            raise ValueError(
                f"--models takes NAME=FOLDER, each name once and none of them teacher or constant; "
                f"got {pair!r}."
            )
        folders[name] = folder
    if arguments.dry_run:
        return print_probe_plan(arguments, folders)
    inputs = {name: folder_digest(path) for name, path in folders.items() if Path(path).is_dir()}
    if arguments.head and Path(arguments.head).exists():
        digest = folder_digest if Path(arguments.head).is_dir() else file_digest
        inputs["head"] = digest(arguments.head)
    for folder in folders.values():
        AutoConfig.from_pretrained(folder)  # a name that is no model is said now, not hours later
    if start_run(arguments, inputs=inputs):
        return
    evaluation = Evaluation(arguments, arguments.teacher)
    for name, folder in folders.items():
        evaluation.judge(name, folder)
    picture = evaluation.draw_predictions(list(folders))
    if evaluation.state.is_main_process:
        if picture:
            print(f"predictions: {picture}")
        finish_run(arguments.output_dir)
    evaluation.state.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
