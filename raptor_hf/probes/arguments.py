"""The recipe of a probe, as arguments, and the grid of heads that it asks for."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedConfig

from ..loop.arguments import LoopArguments
from ..tasks.task import TASKS, Depth, Task
from .transforms import Augmentation


@dataclass(kw_only=True)
class ProbeArguments(LoopArguments):
    """A recipe of a task: its images, how they are augmented, and the heads that are trained."""

    task: Literal["classification", "segmentation", "depth"] = "classification"
    dataset: str = field(
        default="digits",
        metadata={"help": "digits, an image folder or a Hub id; digit_scenes, ADE20k's or NYUv2's"},
    )
    train_split: str = "train"
    test_split: str = "test"
    train_images: int = field(default=0, metadata={"help": "a random choice of so many; 0: all"})
    test_images: int = field(default=0, metadata={"help": "the same for all seeds; 0: all"})
    steps: int | None = field(
        default=None, metadata={"help": "optimiser updates; default: those of the epochs"}
    )
    epochs: int = field(default=10, metadata={"help": "times that the training images are seen"})
    validate_epochs: int = field(default=1, metadata={"help": "epochs between two validations"})
    head: str | None = field(
        default=None,
        metadata={"help": "linear head (file, folder, Hub id) to start from; --steps 0 judges it"},
    )
    learning_rate_grid: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "multiples of learning_rate, heads that are trained side by side"},
    )
    poolings: list[str] = field(
        default_factory=list,
        metadata={"help": "tokens that a head looks at: cls_patches, cls, patches (the grid too)"},
    )
    held_out: float = field(
        default=0.1, metadata={"help": "share of the training images that select among heads"}
    )
    resolution: list[int] = field(
        default_factory=list, metadata={"help": "height and width of the images in pixels"}
    )
    crop_scale: list[float] = field(
        default_factory=list,
        metadata={"help": "random crops: smallest and largest share of the image; none: no crops"},
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [3 / 4, 4 / 3],
        metadata={"help": "smallest and largest width / height of random crops"},
    )
    flip: float = field(default=0.0, metadata={"help": "probability of a horizontal flip"})
    jitter: list[float] = field(
        default_factory=lambda: [0.0] * 4,
        metadata={"help": "random brightness, contrast, saturation, hue (with random crops)"},
    )
    depth_bins: int = 256
    min_depth: float = field(default=0.001, metadata={"help": "metres; nearer pixels don't count"})
    max_depth: float = field(default=10.0, metadata={"help": "metres; farther pixels don't count"})
    eval_crop: list[int] = field(
        default_factory=list,
        metadata={"help": "depth: rows and columns that are judged: top, bottom, left, right"},
    )
    eval_batch_size: int = field(default=64, metadata={"help": "images at a time in evaluation"})
    knn_images: int = field(
        default=100_000, metadata={"help": "classification: images that vote in k-NN; 0: no k-NN"}
    )
    skip_corrupt: int = field(
        default=0, metadata={"help": "unreadable images that are left out, with a warning"}
    )
    features_dir: str | None = field(
        default=None, metadata={"help": "where features are kept; default: only while needed"}
    )

    def __post_init__(self):
        pairs = {"resolution": 2, "crop_scale": 2, "crop_ratio": 2, "jitter": 4, "eval_crop": 4}
        for name, number in pairs.items():
            if len(getattr(self, name)) not in (0, number):
                raise ValueError(f"{name} takes {number} numbers; got {getattr(self, name)}.")
        if not self.crop_scale and (self.flip or any(self.jitter)):
            raise ValueError("flip and jitter belong to random crops: give --crop_scale too.")
        if self.crop_scale and not self.resolution:
            raise ValueError("Random crops need --resolution HEIGHT WIDTH, their size.")
        if self.task != "depth" and self.eval_crop:
            raise ValueError("eval_crop is for depth alone.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1; got {self.held_out}.")

    def augmentation(self) -> Augmentation | None:
        """The random views that are asked for."""
        if not self.crop_scale:
            return None
        return Augmentation(
            size=tuple(self.resolution),
            scale=tuple(self.crop_scale),
            ratio=tuple(self.crop_ratio),
            flip=self.flip,
            jitter=tuple(self.jitter),
        )

    def make_task(self, config: PreTrainedConfig, class_names: list[str] | None) -> Task:
        """The task, for a backbone of this configuration."""
        if self.task != "depth":
            return TASKS[self.task](config, len(class_names))
        crop = self.eval_crop or None
        limits = {"min_depth": self.min_depth, "max_depth": self.max_depth}
        return Depth(config, self.depth_bins, **limits, eval_crop=crop)


class Candidate(NamedTuple):
    """A head of the grid."""

    learning_rate: float
    pooling: str

    def __str__(self) -> str:
        return f"{self.learning_rate:g} {self.pooling}"


def candidates_of(arguments: ProbeArguments, task: type[Task]) -> list[Candidate]:
    """The grid that the arguments ask for; a given head that is only judged is no grid.

    Raises:
        ValueError: a pooling that the task doesn't have.
    """
    poolings = arguments.poolings or task.poolings[:1]
    unknown = set(poolings) - set(task.poolings)
    if unknown:
        raise ValueError(
            f"poolings of {task.name} are {', '.join(task.poolings)}; got {sorted(unknown)}."
        )
    grid = arguments.learning_rate_grid if arguments.steps != 0 else [1.0]
    return [Candidate(f * arguments.learning_rate, p) for p in poolings for f in grid]
