"""What a dry run says: teachers, folders and images in a line each, costs, the printed plan."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

from ..configuration_raptor import token_layout
from ..data import ReadingArguments, load_images
from ..modeling_raptor import PatchFrame
from ..runs.files import size
from ..runs.processes import process_state
from ..tasks.digit_scenes import NUMBER
from ..tasks.task import Classification, Task
from ..teachers import load_processor

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
    name_or_path: str, revision: str | None = None, resolution: tuple[int, int] | None = None
) -> TeacherFacts:
    """Return the configuration and token count of a teacher, for images as its processor makes
    them.

    Args:
        resolution: height and width of the images, if the processor doesn't make them.

    Raises:
        OSError: no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    processor = load_processor(name_or_path, revision)
    pixel_values = processor(Image.new("RGB", (640, 480)), return_tensors="pt")["pixel_values"]
    height, width = resolution or pixel_values.shape[-2:]
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
) -> int | None:
    """Count the images of a split of a local dataset; None for the Hub or a missing folder.

    Args:
        task: whose layout the folder has.
        reading: whether files of a dense task may be missing.

    Raises:
        FileNotFoundError, ValueError: as the run itself, which reads the same files.
    """
    embedded = {"digits": {"train": 1437, "test": 360}, "digit_scenes": NUMBER}
    if dataset in embedded:
        return embedded[dataset].get(split)
    if not Path(dataset).expanduser().is_dir():
        return None
    return len(task.load(dataset, split, reading) if task.dense else load_images(dataset, split))


def describe_images(dataset: str, split: str, *, at_most: int | None = None, **layout) -> str:
    """Describe a split and its number of images, as far as that is known offline.

    Args:
        at_most: so many are taken; default: all.
        layout: `task` and `reading`, as for `count_images`.
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
