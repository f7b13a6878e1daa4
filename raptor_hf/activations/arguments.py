"""Which images a teacher looks at, and where the states that a program learns from come from."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ..data.arguments import CropArguments
from ..runs.arguments import Checked, NonNegative, OnCard, Positive


@dataclass(kw_only=True)
class ImageArguments(Checked):
    """Which images a teacher looks at, in which views, and how it computes."""

    _argument_group_name = "images"

    dataset: str | None = field(
        default=None, metadata={"help": "digits, an image folder or a Hub id"}
    )
    split: str = "train"
    num_images: Positive[int] | None = field(
        default=None, metadata={"help": "so many images, chosen at random; default: all"}
    )
    views: NonNegative[int] = field(
        default=1,
        metadata={
            "help": "views per image, all but the first are augmented; 0, where the teacher "
            "computes online: another random view in every epoch"
        },
    )
    view_seed: NonNegative[int] = field(
        default=0, metadata={"help": "seed of the augmented views and of what is chosen at random"}
    )
    augmentation: Literal["auto", "crops", "maps"] = field(
        default="auto",
        metadata={
            "help": "what augmented views are: random crops (with --crop_scale, --flip, …), small "
            "affine maps, or what suits the dataset: maps for the digits, crops for the rest"
        },
    )
    precision: OnCard[Literal["float32", "bfloat16"]] = field(
        default="float32", metadata={"help": "what the teacher computes in; bfloat16 is for GPUs"}
    )


@dataclass(kw_only=True)
class ActivationArguments(Checked):
    """Whose states are learned, and whether they are stored or computed in training."""

    _argument_group_name = "activations"

    teacher: str = field(metadata={"help": "folder or Hub id of the teacher"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the teacher"})
    activations: str = field(
        metadata={"help": "folder of its activation dataset, or online: computed from --dataset"}
    )

    @property
    def online(self) -> bool:
        """Whether the teacher computes its states while others learn from them."""
        return self.activations == "online"


def check_source(source: ActivationArguments, images: ImageArguments, crops: CropArguments) -> None:
    """Refuse online without a dataset, and options of online for what is stored."""
    if source.online and images.dataset is None:
        raise ValueError("--activations online needs images: give --dataset.")
    for given, default in ((images, ImageArguments()), (crops, CropArguments())):
        for option in [] if source.online else fields(given):
            if getattr(given, option.name) != getattr(default, option.name):
                raise ValueError(
                    f"--{option.name} is for --activations online; what {source.activations} holds "
                    "was decided when it was extracted. Leave it out."
                )
