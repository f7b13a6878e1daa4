"""Depth as a dynamical system: measure a teacher, its Raptors and their nulls on the same images.

    accelerate launch -m evaluation.dynamics --output_dir outputs/digits/dynamics --dataset digits \
        --phases_file outputs/digits/phases/phases.json --model outputs/digits/teacher \
        outputs/digits/seed_0/classification/models/raptor_k{2,3,4}

The nulls are five networks like the teacher that are untrained, and five with its layers in random
order. Takes 70 seconds of a core for these four models and 360 digits, on one process. Writes
dynamics.json with every figure, what_we_see.md with the claims and the figures that decide them,
and three pictures. `--model` also takes Hub ids, and NAME=FOLDER; `--dataset` an image folder or a
Hub dataset.
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation.dynamics.claims import claims_page, depth_verdicts
from evaluation.dynamics.figures import draw_study
from evaluation.dynamics.study import find_partitions, study_models
from raptor_hf import dynamics
from raptor_hf.data import list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import run_program


@dataclass(kw_only=True)
class Arguments:
    """Which models, which images, and where the results go."""

    _argument_group_name = "inputs and outputs"

    model: list[str] = field(
        metadata={"help": "teacher first, then Raptors: folders, Hub ids, or NAME=one of these"}
    )
    dataset: str = field(metadata={"help": "digits, an image folder or a Hub id"})
    output_dir: str = field(metadata={"help": "folder of dynamics.json and figures"})
    split: str = field(default="test", metadata={"help": "of the images"})
    num_images: int = field(default=2000, metadata={"help": "at most, drawn at random"})
    phases_file: str | None = field(
        default=None, metadata={"help": "phases.json of find_phases.py; default: the Raptors'"}
    )
    seed: int = field(default=0, metadata={"help": "of the images, nulls, pushes and tangents"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})


def main(argv: list[str] | None = None) -> None:
    """Load the models, measure them, write the results."""
    own, reading = parse_arguments(Arguments, ReadingArguments, argv=argv)
    sources = named_folders("--model", own.model)

    # a run is its arguments, its models and its images
    images, inputs = load_images(own.dataset, own.split, reading), {}
    for name, folder in zip(own.model, sources.values(), strict=True):
        if any(Path(folder).glob("*.safetensors")):  # a model of ours
            inputs[name] = folder_digest(folder)
    listed = {"images": list_images(own.dataset, images)}
    if start_run(own, reading, inputs=inputs, images=listed):
        return

    # measure
    systems, views = dynamics.load_inputs(own.model, images, reading)
    models, nulls = study_models(
        systems,
        views,
        find_partitions(own.phases_file, systems),
        seed=own.seed,
        num_images=own.num_images,
        num_workers=own.num_workers,
    )

    # write
    about = {"data": public_name(own.dataset), "split": own.split}
    about |= {"num_images": models[0]["num_images"], "environment": environment()}
    folder, study = Path(own.output_dir), rounded({**about, "models": models, "nulls": nulls})
    write_json(folder / "dynamics.json", study)
    (folder / "what_we_see.md").write_text(claims_page(study), encoding="utf-8")
    for name, figure in draw_study(study):
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    finish_run(own.output_dir)
    print(depth_verdicts(study), end="\n\n")
    for result in models:
        for analysis, reason in result["skipped"].items():
            print(f"skipped for {result['model']}: {analysis}: {reason}")
    print(f"claims:  {folder / 'what_we_see.md'}\nfigures: {folder / 'dynamics.json'}")


if __name__ == "__main__":
    run_program(main, alone=True)
