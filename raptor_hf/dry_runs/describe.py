"""What a dry run says: teachers, folders and images in a line each, costs, the printed plan."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..configuration_raptor import token_layout
from ..data import ReadingArguments, load_images
from ..modeling_raptor import bare_teacher, image_arguments, pair, patch_grid
from ..modeling_raptor_heads import PatchFrame
from ..runs.files import size
from ..runs.processes import process_state
from ..tasks.arguments import DenseArguments
from ..tasks.digit_scenes import NUMBER
from ..tasks.task import Classification, Task
from ..teachers import image_size, load_processor
from ..teachers.loading import load_teacher_config

_MEASURED_SECONDS = 2.0
_ASSUMED_TFLOPS = {"float32": 50, "bfloat16": 400}  # sustained on one H100; assumed, not measured


class TeacherFacts(NamedTuple):
    """What a plan needs to know of a teacher."""

    config: PreTrainedConfig
    height: int
    width: int
    num_tokens: int
    num_prefix_tokens: int

    @property
    def state_bytes(self) -> int:
        """Bytes of one state of one image in float16."""
        return 2 * self.num_tokens * self.config.hidden_size


def teacher_facts(
    name_or_path: str, revision: str | None = None, resolution: list[int] | None = None
) -> TeacherFacts:
    """Return the configuration and token count of a teacher, for images as its processor makes
    them.

    Args:
        resolution: height and width of the images, if the processor doesn't make them.

    Raises:
        ValueError: a model of a family that a Raptor can't be made of.
        OSError: no such model.
    """
    config = load_teacher_config(name_or_path, revision)
    height, width = resolution or image_size(load_processor(name_or_path, revision))
    if (height, width) == pair(config.image_size):
        rows, columns = patch_grid((height, width), config)
    else:  # of other sizes dense tasks pad images to whole patches
        rows, columns = PatchFrame.of((height, width), config).grid
    prefix = token_layout(config).num_prefix_tokens
    return TeacherFacts(config, height, width, prefix + rows * columns, prefix)


def cost(flop: float) -> str:
    """Describe a number of FLOP, and how long it takes at the assumed rates."""
    times = []
    for dtype, rate in _ASSUMED_TFLOPS.items():
        seconds = flop / (rate * 1e12)
        time = f"{seconds / 3600:.3g} h" if seconds > 600 else f"{seconds:.3g} s"
        times.append(f"{time} at {rate} TFLOP/s ({dtype})")
    return f"{flop:.3g} FLOP: {', '.join(times)}, if one GPU sustains that"


def measure_teacher(facts: TeacherFacts, batch_size: int, precision: str) -> float:
    """Measure images a second through a random teacher of this architecture, no decoding."""
    state = process_state()
    model = bare_teacher(facts.config, facts.config.num_hidden_layers).eval().to(state.device)
    if state.device.type == "cpu":
        batch_size = min(batch_size, 4 if facts.num_tokens > 100 else 64)
    channels = getattr(facts.config, "num_channels", 3)
    pixel_values = torch.randn(batch_size, channels, facts.height, facts.width, device=state.device)
    arguments = image_arguments(facts.config, pixel_values)

    def run() -> None:
        bfloat16 = precision == "bfloat16"
        with torch.no_grad(), torch.autocast(state.device.type, torch.bfloat16, enabled=bfloat16):
            states = model(pixel_values, **arguments).last_hidden_state
            states[0, 0, 0].item()  # waits for a GPU

    run()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURED_SECONDS:
        run()
        images += batch_size
    return state.num_processes * images / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Return seconds in a readable unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def describe_teacher(name_or_path: str, facts: TeacherFacts) -> str:
    """Describe a teacher in one line."""
    config = facts.config
    return (
        f"{name_or_path}: {config.model_type}, {config.num_hidden_layers} layers × "
        f"{config.hidden_size} channels, {facts.num_tokens} tokens at {facts.height}×{facts.width}"
    )


def describe_folder(path: str | Path, *, absent: str = "not there yet") -> str:
    """Describe a folder and what its files take, or say that it is missing."""
    path = Path(path)
    if not path.is_dir():
        return f"{path}: {absent}"
    files = [file for file in path.rglob("*") if file.is_file()]
    return f"{path}: {len(files):,} files, {size(sum(file.stat().st_size for file in files))}"


def count_images(
    dataset: str,
    split: str,
    task: type[Task] = Classification,
    reading: ReadingArguments | None = None,
    dense: DenseArguments | None = None,
) -> int | None:
    """Count the images of a split of a local dataset; None for the Hub or a missing folder.

    Args:
        task: whose layout the folder has.
        reading, dense: how a dense task reads it.

    Raises:
        FileNotFoundError, ValueError: as the run itself, which reads the same files.
    """
    embedded = {"digits": {"train": 1437, "test": 360}, "digit_scenes": NUMBER}
    if dataset in embedded:
        return embedded[dataset].get(split)
    if not Path(dataset).expanduser().is_dir():
        return None
    if task.dense:
        return len(task.load(dataset, split, reading, dense))
    return len(load_images(dataset, split))


def describe_images(dataset: str, split: str, *, at_most: int | None = None, **layout) -> str:
    """Describe a split and its number of images, as far as that is known offline.

    Args:
        at_most: so many are taken; default: all.
        layout: `task`, `reading` and `dense`, as for `count_images`.
    """
    number = count_images(dataset, split, **layout)
    if number is None:
        known = "no such folder; taken for a Hub dataset, which a dry run does not download"
        return f"{dataset} ({split}): {known}"
    some = f", {at_most:,} of them" if at_most and at_most < number else ""
    return f"{dataset} ({split}): {number:,} images{some}"


def print_plan(title: str, lines: list[tuple[str, str]]) -> None:
    """Print a plan, one topic a line; of several processes the main one does."""
    if not process_state().is_main_process:
        return
    print(f"{title}\nA dry run: nothing is trained, nothing is written.")
    for topic, text in lines:
        print(f"  {topic:<12} {text}")
