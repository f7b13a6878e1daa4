"""Depth as a dynamical system: measure it, draw it, walk through it; teacher and Raptors alike.

    accelerate launch -m evaluation.dynamics --output_dir outputs/digits/dynamics --data digits \
        --phases_file outputs/digits/phases/phases.json --model outputs/digits/teacher \
        outputs/digits/seed_0/classification/models/raptor_k{2,3,4}

Takes a minute for these four models and 360 digits. Writes dynamics.json with every figure,
what_we_see.md, the plots, and dynamics.html, one file to be opened from the disk. `--model` also
takes Hub ids, and NAME=FOLDER; `--data` an image folder, a Hub dataset, or an activation dataset,
which is analysed without any model if none is given. Runs on one process.
"""
# Over 120 lines: a study has many arguments, a third of the file.

from dataclasses import dataclass, field
from pathlib import Path

import raptor_hf
from evaluation.dynamics.arguments import StudyArguments
from evaluation.dynamics.report import write_study
from evaluation.dynamics.study import study_models
from raptor_hf import dry_runs, dynamics
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import (
    Checked,
    NonNegative,
    Positive,
    Watching,
    named_folders,
    parse_arguments,
)
from raptor_hf.runs.files import folder_digest, public_name
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import require_one_process, run_program

TEMPLATE = Path(__file__).parent / "dynamics.html"


@dataclass(kw_only=True)
class Arguments(Checked):
    """Which models, which images, and where what is found goes."""

    _argument_group_name = "inputs and outputs"

    model: list[str] = field(
        default_factory=list,
        metadata={"help": "teacher first, then Raptors: folders, Hub ids, or NAME=one of these"},
    )
    data: str = field(
        metadata={"help": "digits, an image folder, a Hub id, or an activation dataset's folder"}
    )
    output_dir: Watching[str] = field(
        metadata={"help": "folder of dynamics.json, dynamics.html, plots"}
    )
    split: str = field(default="test", metadata={"help": "of the images"})
    num_images: Positive[int] = field(default=2000, metadata={"help": "at most, drawn at random"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py; default: the Raptors'"}
    )
    teacher_head: str | None = field(
        default=None,
        metadata={"help": "linear head of the first model, if it has none of its own"},
    )
    walk_images: NonNegative[int] = field(
        default=10, metadata={"help": "images of the walk; 0: no walk"}
    )
    batch_size: NonNegative[int] = field(
        default=0, metadata={"help": "images at a time; 0: so many that the bar moves"}
    )
    num_workers: Watching[NonNegative[int]] = field(
        default=0, metadata={"help": "processes that read images"}
    )
    resume: Watching[bool] = field(
        default=False, metadata={"help": "leave a finished run as it is"}
    )
    dry_run: Watching[bool] = field(
        default=False, metadata={"help": "print what would be read and written; do nothing"}
    )


PARTS = (Arguments, ReadingArguments, StudyArguments)


def digests(models: dict[str, str], data: str) -> dict[str, str]:
    """What is read of folders of ours: weights, or an activation dataset."""
    folders = {**models, data: data}
    ours = {
        name: folder
        for name, folder in folders.items()
        if any(Path(folder).glob("*.safetensors")) or dynamics.is_store(folder)
    }
    return {name: folder_digest(folder) for name, folder in ours.items()}


def main() -> None:
    """Load the models, measure them, write what was found."""
    own, reading, analyses = parse_arguments(*PARTS)
    require_one_process()
    models = named_folders("--model", own.model)
    if own.dry_run:
        reads = [dry_runs.describe_images(own.data, own.split, at_most=own.num_images)]
        return dry_runs.print_study_plan("Study depth", models, reads, own.output_dir)
    images, read = None, {}
    if not dynamics.is_store(own.data):
        images = raptor_hf.data.load_images(own.data, own.split, reading)
        read = {"images": raptor_hf.data.list_images(own.data, images)}
    inputs = digests(dict(zip(own.model, models.values(), strict=True)), own.data)
    if start_run(own, reading, analyses, inputs=inputs, images=read):
        return
    inputs = dynamics.load_inputs(
        own.model,
        own.data,
        split=own.split,
        teacher_head=own.teacher_head,
        reading=reading,
        dataset=images,
    )
    results = study_models(
        inputs.systems,
        inputs.images,
        dynamics.find_partitions(own.phases_file, inputs.systems),
        analyses,
        folder=own.output_dir,
        num_images=own.num_images,
        batch_size=own.batch_size,
        num_workers=own.num_workers,
    )
    table = write_study(
        own.output_dir,
        results,
        inputs,
        about={"data": public_name(own.data), "split": own.split},
        template=TEMPLATE,
        walk_images=own.walk_images,
    )
    finish_run(own.output_dir)
    print(table, end="\n\n")
    for result in results:
        for analysis, reason in result["left_out"].items():
            print(f"left out for {result['model']}: {analysis.replace('_', ' ')}: {reason}")
    output_dir = Path(own.output_dir)
    print(f"report:  {output_dir / 'dynamics.html'}\nfigures: {output_dir / 'dynamics.json'}")


if __name__ == "__main__":
    run_program(main)
