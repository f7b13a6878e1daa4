"""The atlas: a map of the phases of many teachers, on the same images, and a page that compares.

    python -m evaluation.recurrence.atlas --dataset path/to/images --output_dir outputs/atlas \
        --teachers facebook/dinov2-small "My own ViT=path/to/teacher"

Writes `<name>.json` and `<name>.png` a teacher, and `README.md` with the tables of all. A teacher
that is finished is skipped: name one more, and only that one is measured. Without `--teachers` the
page is made anew of the files in the folder. A DINOv2-S and 500 images take two minutes on one
core.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np

from raptor_hf.activations.online import OnlineActivations, stream_states
from raptor_hf.data import ImageViews, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.phases.distance import image_distances, tidy_distances
from raptor_hf.phases.stability import cut_stability, default_methods, resampled_distances
from raptor_hf.reports.figures import plot_layer_distance
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import public_name, read_json, rounded, write_json
from raptor_hf.runs.folder import environment, finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_processor, load_vision_model, teacher_identity

_KIND = "phase map"  # value of the key `kind` of a map's file
_KS = (2, 3, 4, 5, 6)
_HEAD = """# Atlas of phases

Where the depth of Vision Transformers falls into phases, runs of similar layers, after
"Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941). Each figure is made of the
JSON file beside it, `<name>.json`, which holds distances of layers, and cuts with their stability.

In brackets: the share of bootstrap resamples of the images with exactly these phases."""


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
    num_images: int = field(
        default=500, metadata={"help": "at most, drawn at random; the same ones for all teachers"}
    )
    output_dir: str = field(
        metadata={"help": "folder of README.md and <name>.json, with maps of other teachers or not"}
    )
    resume: bool = field(default=False, metadata={"help": "go on after a run that was cut off"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})


def file_name(title: str) -> str:
    """Return the letters and digits of a title in lower case, with `_` between them."""
    return re.sub(r"[\W_]+", "_", title.lower()).strip("_")


def phase_map(source: OnlineActivations, num_images: int, num_workers: int = 0) -> dict:
    """Measure the layer distances of a model on some images, and cut them.

    Memory holds (L, L) distances of every image, and one batch of states.

    Returns:
        `num_images`; `distance` (L, L); `cuts`: `cut_stability` by method and k.

    Raises:
        ValueError: states that are not finite.
    """
    # the distances of every image: the mean of one row a token group
    distances = []
    for states in stream_states(
        source, "phase map", num_images=num_images, num_workers=num_workers
    ):
        pairs = image_distances(states, source.layout)
        distances.append(pairs.unflatten(0, (-1, len(states))).mean(dim=0).cpu().numpy())

    # cut their mean, and those of bootstrap resamples
    of_images = np.concatenate(distances)
    mean, resampled = tidy_distances(of_images.mean(axis=0)), resampled_distances(of_images)
    cuts: dict[str, dict[str, dict]] = {}
    for method in default_methods(len(mean)):
        cuts[method] = {}
        for k in _KS:
            if k <= len(mean):
                cuts[method][str(k)] = cut_stability(mean, resampled, k, method)
    return {"num_images": len(of_images), "distance": mean.tolist(), "cuts": cuts}


def map_teacher(
    title: str, name: str, images: datasets.Dataset, own: Arguments, reading: ReadingArguments
) -> None:
    """Measure a teacher and write its file, unless that was done before.

    Each teacher is a run of its own, with its record in `runs/<file>`.

    Args:
        title: of the teacher on the page.
        name: folder or Hub id.
        images: of all teachers.
    """
    # the model, its images, and whether it is finished
    folder, file = Path(own.output_dir), file_name(title)
    path, record = folder / f"{file}.json", folder / "runs" / file
    model = load_vision_model(name).to(process_state().device)
    processor = load_processor(name, reading.resolution)
    source = OnlineActivations(model, ImageViews(images, processor, reading=reading))
    own = replace(own, output_dir=str(record), teachers=[f"{title}={name}"])
    listed, identity = list_images(own.dataset, images), teacher_identity(model)
    inputs = {"weights": identity["weights_sha256"]}
    if start_run(own, reading, inputs=inputs, images={"images": listed}) and path.exists():
        return

    # measure, and write all at once, without a path of this machine
    content = {
        "kind": _KIND,
        "name": title,
        "model_type": model.config.model_type,
        "source": identity["name"],
        "revision": identity["revision"],
        **inputs,
        "num_layers": source.depth,
        "num_parameters": model.num_parameters(),
        "image_size": source.resolution,
        "dataset": public_name(own.dataset),
        "split": own.split,
        "images_sha256": listed.content_digest,
        **phase_map(source, own.num_images, own.num_workers),
    }
    write_json(path, rounded({**content, "environment": environment()}))
    finish_run(record)


def load_atlas(folder: str | Path) -> list[dict]:
    """Load the maps of a folder, sorted by file; other JSON files in it are left alone."""
    contents = [read_json(path) for path in sorted(Path(folder).glob("*.json"))]
    return [one for one in contents if isinstance(one, dict) and one.get("kind") == _KIND]


def write_page(folder: str | Path) -> Path:
    """Write `README.md`, and `<name>.png` of all maps in a folder."""
    folder, maps = Path(folder), load_atlas(folder)
    parts = [_HEAD, cuts_table(maps), teachers_table(maps)]
    for one in maps:
        # the partitions of the first method, the published one
        picture, cuts = f"{file_name(one['name'])}.png", next(iter(one["cuts"].values()))
        phases = {k: cut["phases"] for k, cut in cuts.items() if k in "234" and cut["phases"]}
        plot_layer_distance(np.array(one["distance"]), phases, folder / picture)
        parts += [f"## {one['name']}", f"![phase map of {one['name']}]({picture})"]
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def cuts_table(maps: Sequence[dict]) -> str:
    """Return the cuts of all teachers with their stability: a row a teacher and method."""
    rows = []
    for one in maps:
        for method, cuts in one["cuts"].items():
            row = [one["name"].replace("|", "\\|"), method]
            for k in _KS:
                cut = cuts.get(str(k))
                if cut is None:
                    row.append("–")
                elif cut["phases"] is None:
                    row.append("no partition")
                else:
                    row.append(f"{', '.join(map(str, cut['phases']))} ({100 * cut['same']:.0f} %)")
            rows.append(row)
    return markdown_table(["teacher", "method", *(f"k = {k}" for k in _KS)], rows)


def teachers_table(maps: Sequence[dict]) -> str:
    """Return the sizes of the teachers, and the images that they were mapped on."""
    rows = []
    for one in maps:
        rows.append(
            [
                one["name"].replace("|", "\\|"),
                one["model_type"],
                str(one["num_layers"]),
                f"{one['num_parameters'] / 1e6:.3g} M",
                "×".join(map(str, one["image_size"])),
                f"{one['num_images']:,} of {one['dataset']} ({one['split']})",
            ]
        )
    return markdown_table(["teacher", "type", "layers", "parameters", "pixels", "images"], rows)


def main(argv: list[str] | None = None) -> None:
    """Measure the teachers that are named, and write the page of all."""
    own, reading = parse_arguments(Arguments, ReadingArguments, argv=argv)
    teachers = named_folders("--teachers", own.teachers)
    if teachers:
        if not own.dataset:
            raise ValueError("--teachers are looked at on images: give --dataset, too.")
        images = load_images(own.dataset, own.split, reading)
    for title, name in teachers.items():
        map_teacher(title, name, images, own, reading)
    print(f"page:    {write_page(own.output_dir)}\nfigures: {own.output_dir}/*.json")


if __name__ == "__main__":
    run_program(main, alone=True)
