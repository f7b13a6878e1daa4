"""The atlas: a map of the phases of many teachers, on the same images, and a page that compares.

    python -m evaluation.recurrence.atlas --dataset path/to/images --output_dir outputs/atlas \
        --teachers facebook/dinov2-small "My own ViT=path/to/teacher"

Writes `<name>.json` and `<name>.png` a teacher, and `README.md` with the tables of all. A teacher
that is finished is skipped: name one more, and only that one is measured. Without `--teachers` the
page is made anew of the files in the folder. A DINOv2-S and 500 images take three minutes on one
core.
"""

import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import datasets

from evaluation.recurrence.atlas_page import write_page
from evaluation.recurrence.maps import (
    KIND,
    MapArguments,
    file_name,
    load_atlas,
    model_facts,
    phase_map,
)
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.data import ImageViews, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.data.views import drop_unreadable
from raptor_hf.hub import upload_files
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import public_name, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import (
    Interrupted,
    process_state,
    run_program,
)
from raptor_hf.teachers import load_processor, load_vision_model


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
        metadata={"help": "folder of README.md and <name>.json, with maps of other teachers or not"}
    )
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "dataset on the Hub for the whole atlas: NAME/set"}
    )
    private: bool = field(
        default=False, metadata={"help": "only its owner sees the dataset on the Hub"}
    )


class Teacher(NamedTuple):
    """A teacher of the atlas: its file without .json, its title, its folder or Hub id."""

    file: str
    title: str
    source: str


def named_teachers(values: Iterable[str]) -> list[Teacher]:
    """Return the teachers that a command line names.

    Args:
        values: folders or Hub ids, or `NAME=one of these`. A name may hold anything but `=`.

    Raises:
        ValueError: no source or name, or two teachers with files of one name.
    """
    teachers = []
    for value in values:
        title, equals, source = value.partition("=")
        if not equals or Path(value).is_dir():
            title, source = public_name(value), value
        teachers.append(Teacher(file_name(title), title.strip(), source))
    named_folders("--teachers", [f"{one.file}={one.source}" for one in teachers])
    return teachers


def map_teacher(
    teacher: Teacher,
    images: datasets.Dataset,
    own: Arguments,
    reading: ReadingArguments,
    options: MapArguments,
) -> None:
    """Measure a teacher and write its file, unless that was done before.

    Each teacher is a run of its own, with its record in `runs/<file>`. Errors as they come.
    """
    # the model, its images, and whether it is finished
    folder = Path(own.output_dir)
    path, record = folder / f"{teacher.file}.json", folder / "runs" / teacher.file
    model = load_vision_model(teacher.source).to(process_state().device)
    processor = load_processor(teacher.source, None, reading.resolution)
    source = OnlineActivations(model, ImageViews(images, processor, reading=reading))
    own = replace(own, output_dir=str(record), teachers=[f"{teacher.title}={teacher.source}"])
    listed = list_images(own.dataset, images)
    inputs = {"weights": source.identity()}
    if start_run(own, options, reading, inputs=inputs, images={"images": listed}) and path.exists():
        return

    # measure, and write all at once
    drop_unreadable(source.images)
    content = {
        "kind": KIND,
        "name": teacher.title,
        **model_facts(source),
        "dataset": public_name(own.dataset),
        "split": own.split,
        "images_sha256": listed.content_digest,
        **phase_map(source, options, num_workers=own.num_workers, description=teacher.title),
    }
    write_json(path, rounded({**content, "environment": environment()}))
    finish_run(record)


def map_teachers(
    own: Arguments, reading: ReadingArguments, options: MapArguments
) -> dict[str, str]:
    """Measure all teachers; return the reasons of those that failed, by title.

    One that fails does not stop the others.
    """
    teachers, failed = named_teachers(own.teachers), {}
    if not teachers:
        return {}
    if not own.dataset:
        raise ValueError("--teachers are looked at on images: give --dataset, too.")
    images = load_images(own.dataset, own.split, reading)
    for number, teacher in enumerate(teachers, 1):
        process_state().print(f"teacher {number} of {len(teachers)}: {teacher.title}", flush=True)
        try:
            map_teacher(teacher, images, own, reading, options)
        except Interrupted:
            raise
        except Exception as error:  # of any library: the model may be anybody's
            if not isinstance(error, ValueError | OSError | ImportError):
                traceback.print_exc()
            failed[teacher.title] = " ".join(f"{error or type(error).__name__}".split())
    return failed


def main(argv: list[str] | None = None) -> None:
    """Measure, write the page, publish, and report failures."""
    own, reading, options = parse_arguments(Arguments, ReadingArguments, MapArguments, argv=argv)
    failed = map_teachers(own, reading, options)
    page = write_page(own.output_dir)
    if page is not None:
        print(f"page:    {page}\nfigures: {own.output_dir}/*.json")
    for name, reason in failed.items():
        print(f"failed:  {name}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)  # an atlas that lacks a teacher is not published
    if own.push_to_hub:
        # by name: records of runs lie in the same folder
        names = [file_name(one["name"]) for one in load_atlas(own.output_dir)]
        files = ["README.md", *(f"{name}.{end}" for name in names for end in ("json", "png"))]
        commit = upload_files(
            own.output_dir, own.push_to_hub, files, repo_type="dataset", private=own.private
        )
        print(f"dataset: {own.push_to_hub}, revision {commit}")


if __name__ == "__main__":
    run_program(main, alone=True)
