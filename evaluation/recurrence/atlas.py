"""The atlas: a map of the phases of many teachers, on the same images, and a page that compares.

    python -m evaluation.recurrence.atlas --dataset path/to/images --output_dir outputs/atlas \
        --teachers facebook/dinov2-small "My own ViT=path/to/teacher"

Writes `<name>.json` a teacher, and `atlas.html`, one file to be opened from the disk. A teacher
that is finished is skipped: name one more, and only that one is measured. Without `--teachers` the
page is made anew of the files in the folder. A DINOv2-S and 500 images take three minutes on one
core. `--gap_units 40` adds how close Raptors of k blocks come after a short training each.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import raptor_hf
from evaluation.recurrence.atlas_arguments import AtlasArguments
from evaluation.recurrence.experiments import add_gaps
from evaluation.recurrence.hub import publish_atlas
from evaluation.recurrence.maps import map_teachers, named_teachers
from evaluation.recurrence.page import write_page
from evaluation.recurrence.workbench import default_settings
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.processes import run_program

TEMPLATE = Path(__file__).parent / "atlas.html"


@dataclass(kw_only=True)
class Arguments:
    """Which teachers, which images, and where the maps go."""

    _argument_group_name = "inputs and outputs"

    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "vision models: folders, Hub ids, or NAME=one of these"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "digits, an image folder or a Hub id"}
    )
    split: str = field(default="train", metadata={"help": "of the images"})
    output_dir: str = field(
        metadata={"help": "folder of atlas.html and <name>.json, which other teachers may be in"}
    )
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})
    gap_units: float = field(
        default=0,
        metadata={
            "help": "measure ε(k) too: a Raptor for every k, each with so much compute (steps of "
            "64 images through all layers; 40 or more); 0: no"
        },
    )
    gap_split: str = field(
        default="test", metadata={"help": "images that these Raptors do not learn from"}
    )
    gap_processes: int = field(
        default=1, metadata={"help": "Raptors that are trained at the same time"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "dataset on the Hub that the whole atlas goes to: NAME/set"}
    )
    private: bool = field(
        default=False, metadata={"help": "only its owner sees the dataset on the Hub"}
    )


PARTS = (Arguments, ReadingArguments, AtlasArguments)


def measure(own: Arguments, reading: ReadingArguments, options: AtlasArguments) -> dict[str, str]:
    """Measure the teachers that are not there yet; why some failed, by their names."""
    teachers = named_teachers(own.teachers)
    if not teachers:
        return {}
    if not own.dataset:
        raise ValueError("--teachers are looked at on images: give --dataset, too.")
    images = raptor_hf.data.load_images(own.dataset, own.split, reading)
    failed = map_teachers(teachers, images, own, options, reading)
    for teacher in teachers:
        if own.gap_units and teacher.title not in failed:
            folder = Path(own.output_dir)
            record = folder / "runs" / f"{teacher.file}_gap_{own.gap_units:g}_{own.gap_split}"
            settings = default_settings(
                teacher.source, own.dataset, (own.split, own.gap_split), reading, own.gap_units,
                record,
            )  # fmt: skip
            path = folder / f"{teacher.file}.json"
            try:
                add_gaps(path, settings, processes=own.gap_processes)
            except (ValueError, OSError) as error:  # a teacher that no Raptor can be made of, say
                failed[teacher.title] = f"its map is made, its Raptors are not: {error}"
    return failed


def main(argv: list[str] | None = None) -> None:
    """Measure, write the page, publish, and say what failed."""
    own, reading, options = parse_arguments(*PARTS, argv=argv)
    failed = measure(own, reading, options)
    page = write_page(own.output_dir, TEMPLATE)
    if page is not None:
        print(f"page:    {page}\nfigures: {own.output_dir}/*.json")
    for name, reason in failed.items():
        print(f"failed:  {name}: {reason}", file=sys.stderr)
    if own.push_to_hub and failed:
        print("Nothing was published: a teacher failed.", file=sys.stderr)
    elif own.push_to_hub:
        commit = publish_atlas(own.output_dir, own.push_to_hub, private=own.private)
        print(f"dataset: {own.push_to_hub}, revision {commit}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, alone=True)
