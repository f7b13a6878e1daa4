"""Arguments: the images that a teacher sees, and the source of its states."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.arguments import both_sides
from ..runs.arguments import check_not_negative, check_positive


@dataclass(kw_only=True)
class ImageArguments:
    """The images that a teacher sees, in which views, and how it computes."""

    _argument_group_name = "images"

    dataset: str | None = field(
        default=None, metadata={"help": "digits, an image folder or a Hub id"}
    )
    split: str = "train"
    num_images: int | None = field(
        default=None, metadata={"help": "so many images, chosen at random; default: all"}
    )
    views: int = field(
        default=1,
        metadata={
            "help": "views per image, all but the first are random; 0, online: another one an epoch"
        },
    )
    view_seed: int = field(
        default=0, metadata={"help": "seed of the random views and of the choice of images"}
    )
    precision: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"help": "precision of the teacher's forward pass; bfloat16 is for GPUs"},
    )

    def __post_init__(self):
        check_positive(self, "num_images")
        check_not_negative(self, "views")


@dataclass(kw_only=True)
class ActivationArguments:
    """The teacher, and whether its states are stored or computed during training."""

    _argument_group_name = "activations"

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    activations: str = field(
        metadata={"help": "folder of its activation dataset, or online: computed from --dataset"}
    )
    also_resolution: list[int] = field(
        default_factory=list,
        metadata={"help": "online: as --resolution, a second size, that every other batch has"},
    )

    def __post_init__(self):
        self.also_resolution = both_sides("also_resolution", self.also_resolution)
        if self.also_resolution and not self.online:
            raise ValueError("--also_resolution is for --activations online.")

    @property
    def online(self) -> bool:
        """Whether the teacher computes its states during training."""
        return self.activations == "online"
