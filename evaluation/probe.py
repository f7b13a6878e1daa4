"""Judge frozen backbones by a linear probe of one task; for classification, Raptors by R², too.

    accelerate launch evaluation/probe.py training/recipes/digits_segmentation_probe.yaml \
        --teacher outputs/digits/teacher --models raptor_k3=outputs/digits/seed_0/raptor_k3 \
        --output_dir outputs/digits/seed_0/segmentation

results/ gets <model>_<task>.json and, for classification, <model>_r2.json of every Raptor; for
dense tasks a picture of some predictions lies beside it. models/ gets every Raptor with its head.
"""

from dataclasses import dataclass, field
from pathlib import Path

from raptor_hf import probes
from raptor_hf.data.arguments import CropArguments, ReadingArguments
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.probes.arguments import ProbeArguments
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import file_digest, folder_digest, json_digest
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import run_program
from raptor_hf.tasks.arguments import DenseArguments


@dataclass(kw_only=True)
class Arguments:
    """Which models to judge."""

    _argument_group_name = "models"

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher; it is judged too"})
    models: list[str] = field(
        default_factory=list, metadata={"help": "Raptors and baselines, as NAME=FOLDER"}
    )


PARTS = (Arguments, ProbeArguments, CropArguments, DenseArguments, ReadingArguments)
PARTS += (LoopArguments,)
# by default no random views, as many steps as the recipe's epochs have, and no warm-up, which a few
# images would never leave
DEFAULTS = {"crop_scale": [], "flip": 0.0, "steps": None, "learning_rate": 1e-3, "warmup_steps": 0}


def main(argv: list[str] | None = None) -> None:
    """Probe the teacher and every model, write the results."""
    parts = parse_arguments(*PARTS, argv=argv, defaults=DEFAULTS)
    own, recipe, crops, dense, reading, training = parts

    # the models, the head and the processor are a part of what the run is
    models = named_folders("--models", own.models, reserved=("teacher", "constant"))
    folders = {"teacher": own.teacher, **models}
    inputs = {}
    for name, path in folders.items():
        if Path(path).is_dir():
            inputs[name] = folder_digest(path)
            inputs[f"{name}, configuration"] = file_digest(Path(path) / "config.json")
    if recipe.head and Path(recipe.head).exists():
        digest = folder_digest if Path(recipe.head).is_dir() else file_digest
        inputs["head"] = digest(recipe.head)
    evaluation = probes.Evaluation(recipe, crops, dense, reading, training, folders)
    inputs["processor"] = json_digest(evaluation.processor.to_dict())

    # the plan, and all checks, before the first image
    splits = evaluation.splits
    files = {
        "train_images": splits["train"].images.files,
        "test_images": splits["validation"].images.files,
    }
    counts = ", ".join(f"{name} of {one.num_files:,} files" for name, one in files.items())
    evaluation.state.print(f"{recipe.task} of {', '.join(folders)}: {counts}")
    evaluation.load_models()
    if start_run(*parts, inputs=inputs, images=files):
        return

    # probe one model after the other
    for name in folders:
        evaluation.evaluate_model(name)
    if evaluation.state.is_main_process:
        print(f"results: {training.output_dir}/results")
        finish_run(training.output_dir)
    evaluation.state.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
