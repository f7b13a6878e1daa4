"""Arguments of every program that reads images."""

from dataclasses import dataclass, field

from ..runs.arguments import check_positive


@dataclass(kw_only=True)
class ReadingArguments:
    """Where images lie in a dataset, and how they are read."""

    _argument_group_name = "reading images"

    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a Hub dataset that has several"}
    )
    image_column: str = field(default="image", metadata={"help": "column of a Hub dataset"})
    label_column: str = field(
        default="label", metadata={"help": "column of a Hub dataset; without it: no labels"}
    )
    skip_corrupt: bool = field(
        default=False,
        metadata={"help": "the next image takes the place of one that can't be read"},
    )
    resolution: list[int] = field(
        default_factory=list,
        metadata={
            "help": "height and width in pixels that models get, or one number for both; default: "
            "as the teacher's image processor makes them"
        },
    )

    def __post_init__(self):
        self.resolution = both_sides("resolution", self.resolution)


def both_sides(name: str, sides: list[int]) -> list[int]:
    """Return height and width of an option; one number stands for both."""
    if len(sides) > 2 or min(sides, default=1) < 1:
        raise ValueError(f"--{name} takes one or two positive numbers; got {sides}.")
    return sides * 2 if len(sides) == 1 else sides


@dataclass(kw_only=True)
class CropArguments:
    """Random views of photographs, see `Augmentation`."""

    _argument_group_name = "random views"

    crop_scale: list[float] = field(
        default_factory=lambda: [0.35, 1.0],
        metadata={"help": "random crops: smallest and largest share of the image; none: no crops"},
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [3 / 4, 4 / 3],
        metadata={"help": "smallest and largest width / height of random crops"},
    )
    flip: float = field(default=0.5, metadata={"help": "probability of a horizontal flip"})

    def __post_init__(self):
        check_positive(self, "crop_scale", "crop_ratio")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"--flip must lie in [0, 1]; got {self.flip}.")
        for name in ("crop_scale", "crop_ratio"):
            pair = getattr(self, name)
            if len(pair) not in (0, 2) or pair != sorted(pair):
                raise ValueError(f"{name} takes two numbers, the smaller one first; got {pair}.")
        if self.flip and not self.crop_scale:
            raise ValueError("flip belongs to random crops: give --crop_scale too.")
