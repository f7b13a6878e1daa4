"""Measure how far apart a model's layers are, and cut them into phases.

    python training/find_phases.py --k 2 3 4 --output_dir outputs/phases \
        --teacher google/vit-base-patch16-224 --dataset path/to/images

or, instead of the second line, `--activations outputs/digits/activations` or
`--distance tests/fixtures/dinov2_base_layer_distance.json`.

Writes `phases.json` (matrix, phases for every k) and `layer_distance.png`, in seconds; a teacher,
any vision model of transformers, takes minutes on a GPU for 10,000 images, and nothing else is
stored. That matrix with `--thresholds 0.20 0.10 0.09` gives [7, 5], [7, 3, 2] and [4, 3, 3, 2].
"""

from dataclasses import dataclass, field

import numpy as np

from raptor_hf import activations, phases, reports
from raptor_hf.data import ImageViews, list_images, load_images
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import check_not_negative, check_positive, parse_arguments
from raptor_hf.runs.files import file_digest, folder_digest, write_json
from raptor_hf.runs.folder import finish_run, start_run
from raptor_hf.runs.processes import process_state, run_program
from raptor_hf.teachers import load_processor, load_vision_model, teacher_identity


@dataclass
class Arguments:
    """Which layers to cut, and how."""

    output_dir: str = field(metadata={"help": "folder of phases.json and layer_distance.png"})
    activations: str | None = field(default=None, metadata={"help": "activation dataset's folder"})
    teacher: str | None = field(default=None, metadata={"help": "vision model, to run on images"})
    distance: str | None = field(default=None, metadata={"help": "JSON file with a matrix"})
    dataset: str = field(default="digits", metadata={"help": "digits, an image folder or a Hub id"})
    split: str = "train"
    num_images: int = field(default=10_000, metadata={"help": "images to look at, at most"})
    batch_size: int = 64
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    k: list[int] = field(default_factory=list, metadata={"help": "numbers of phases (2 3 4)"})
    thresholds: list[float] = field(default_factory=list, metadata={"help": "instead of --k"})
    method: str = field(default="recursive", metadata={"help": "or maxcut, random, uniform"})
    seed: int = field(default=0, metadata={"help": "seed of the images and of random phases"})
    resume: bool = field(default=False, metadata={"help": "go on with an unfinished run"})

    def __post_init__(self):
        check_positive(self, "num_images", "batch_size", "k")
        check_not_negative(self, "thresholds")


PARTS = (Arguments, ReadingArguments)


def cut(distance: np.ndarray, arguments: Arguments) -> dict[str, list[int]]:
    """Return and print the phases, by their number. Numbers nobody asked for may be impossible."""
    partitions = {}
    for threshold in arguments.thresholds:
        lengths = phases.recursive_max_cut(distance, threshold)
        partitions[str(len(lengths))] = lengths
        process_state().print(f"k={len(lengths)}: phases {lengths} (threshold {threshold:g})")
    if partitions:
        return partitions
    for k in arguments.k or [2, 3, 4]:
        try:
            lengths = phases.find_phases(distance, k, arguments.method, seed=arguments.seed)
        except ValueError as error:
            if arguments.k:
                raise ValueError(
                    f"{error} The distances are kept: --distance {arguments.output_dir}/phases.json"
                ) from error
            process_state().print(f"no {k} phases: {error}")
            continue
        partitions[str(k)] = lengths
        process_state().print(f"k={k}: phases {lengths}")
    return partitions


def main(argv: list[str] | None = None) -> None:
    """Measure or read the matrix, cut, write, print."""
    arguments, reading = parse_arguments(*PARTS, argv=argv)
    given = [name for name in ("activations", "teacher", "distance") if getattr(arguments, name)]
    if len(given) != 1:
        raise ValueError(f"Give one of --activations, --teacher and --distance; got {given}.")
    if arguments.thresholds and (arguments.k or arguments.method != "recursive"):
        raise ValueError("--thresholds is for --method recursive and decides k: leave --k away.")
    if reading.resolution and not arguments.teacher:
        raise ValueError("--resolution is for images: give --teacher, or leave it out.")

    # what the distances are read or measured from
    path, states, number, read = getattr(arguments, given[0]), None, None, {}
    source = {given[0]: path}
    if arguments.distance:
        distance = phases.load_distance(path)
        inputs = {"distance": file_digest(path)}
    elif arguments.activations:
        states = activations.load_activations(path)
        activations.check_all_layers(states)
        inputs = {"activations": folder_digest(path)}
    else:
        model = load_vision_model(path)
        source = {"teacher": teacher_identity(model)}
        inputs = {"teacher": source["teacher"]["weights_sha256"]}
        images = load_images(arguments.dataset, arguments.split, reading)
        read = {"images": list_images(arguments.dataset, images)}
        views = ImageViews(images, load_processor(path, reading.resolution), reading=reading)
        states = activations.OnlineActivations(model.to(process_state().device), views)

    # what can't be cut is refused before it is measured
    for k in arguments.k or [1]:
        phases.check_cut(states.depth if states else len(distance), k, arguments.method)
    if start_run(arguments, reading, inputs=inputs, images=read):
        return
    if states:
        names = ("num_images", "seed", "batch_size", "num_workers")
        options = {name: getattr(arguments, name) for name in names}
        stream = activations.stream_states(states, "layer distances", **options)
        distance = phases.layer_distance(stream, states.layout)
        number = min(arguments.num_images, len(states))

    # the distances are written first: cutting them may fail
    distance = distance.round(6)
    file = f"{arguments.output_dir}/phases.json"
    content = {"phases": {}, "method": arguments.method, "source": source}
    content |= {"distance": distance.tolist(), "num_images": number}
    if process_state().is_main_process:
        write_json(file, content)
    partitions = cut(distance, arguments)
    if not process_state().is_main_process:
        return
    reports.plot_layer_distance(distance, partitions, f"{arguments.output_dir}/layer_distance.png")
    write_json(file, content | {"phases": partitions})
    finish_run(arguments.output_dir)


if __name__ == "__main__":
    run_program(main)
