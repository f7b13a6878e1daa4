"""The recipe of a probe, as arguments."""

from dataclasses import dataclass, field
from typing import Literal

from ..runs.arguments import check_not_negative, check_positive


@dataclass(kw_only=True)
class ProbeArguments:
    """A recipe of a task: its images, how they are augmented, and the heads that are trained."""

    _argument_group_name = "probe"

    task: Literal["classification", "segmentation", "depth"] = "classification"
    dataset: str = field(
        default="digits",
        metadata={"help": "digits, an image folder or a Hub id; digit_scenes, ADE20k's or NYUv2's"},
    )
    train_split: str = "train"
    test_split: str = "test"
    train_images: int = field(default=0, metadata={"help": "a random choice of so many; 0: all"})
    test_images: int = field(default=0, metadata={"help": "the same for all seeds; 0: all"})
    epochs: int = field(default=10, metadata={"help": "times that the training images are seen"})
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
    depth_bins: int = 256
    max_depth: float = field(default=10.0, metadata={"help": "metres; farther pixels don't count"})
    eval_crop: list[int] = field(
        default_factory=list,
        metadata={"help": "depth: rows and columns that are judged: top, bottom, left, right"},
    )
    eval_batch_size: int = field(default=64, metadata={"help": "images at a time in evaluation"})

    def __post_init__(self):
        check_positive(self, "epochs", "learning_rate_grid", "max_depth", "eval_batch_size")
        check_not_negative(self, "train_images", "test_images")
        if len(self.eval_crop) not in (0, 4):
            raise ValueError(f"eval_crop takes 4 numbers; got {self.eval_crop}.")
        if self.task != "depth" and self.eval_crop:
            raise ValueError("eval_crop is for depth alone.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1; got {self.held_out}.")
