"""How images are found and read: arguments of every program that reads some."""

from dataclasses import dataclass, field

from ..runs.arguments import Checked, NonNegative, Positive, Share, Watching


@dataclass(kw_only=True)
class ReadingArguments(Checked):
    """Where images lie in a dataset, and what is done about those that can't be read."""

    _argument_group_name = "reading images"

    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a Hub dataset that has several"}
    )
    image_column: str = field(default="image", metadata={"help": "column of a Hub dataset"})
    label_column: str = field(
        default="label", metadata={"help": "column of a Hub dataset; without it: no labels"}
    )
    skip_corrupt: Watching[NonNegative[int]] = field(
        default=0,
        metadata={"help": "unreadable images that are left out, with a warning; at most so many"},
    )
    max_megapixels: Positive[float] = field(
        default=89.0, metadata={"help": "larger images can't be read: a bound on memory"}
    )
    shorter_side: NonNegative[int] = field(
        default=0,
        metadata={
            "help": "shrink larger images to so many pixels on their shorter side before anything "
            "else, JPEG files while they are decoded; 0: they stay as they are"
        },
    )
    image_cache: Watching[str | None] = field(
        default=None,
        metadata={
            "help": "folder that keeps decoded (and shrunk) images: the first run writes it, and "
            "all others read their images from there"
        },
    )
    resolution: list[Positive[int]] = field(
        default_factory=list,
        metadata={
            "help": "height and width in pixels that models get, or one number for both; default: "
            "as the teacher's image processor makes them"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.resolution) > 2:
            raise ValueError(f"resolution takes one or two numbers; got {self.resolution}.")
        if len(self.resolution) == 1:
            self.resolution = self.resolution * 2

    @property
    def sizes(self) -> dict[str, float]:
        """What `read_image` is to know: how large an image may be, and how large it becomes."""
        return {"max_megapixels": self.max_megapixels, "shorter_side": self.shorter_side}


@dataclass(kw_only=True)
class CropArguments(Checked):
    """What random views of photographs are, see `Augmentation`."""

    _argument_group_name = "random views"

    crop_scale: list[Positive[float]] = field(
        default_factory=lambda: [0.35, 1.0],
        metadata={"help": "random crops: smallest and largest share of the image; none: no crops"},
    )
    crop_ratio: list[Positive[float]] = field(
        default_factory=lambda: [3 / 4, 4 / 3],
        metadata={"help": "smallest and largest width / height of random crops"},
    )
    flip: Share[float] = field(default=0.5, metadata={"help": "probability of a horizontal flip"})
    jitter: list[NonNegative[float]] = field(
        default_factory=lambda: [0.0] * 4,
        metadata={"help": "random brightness, contrast, saturation, hue (with random crops)"},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, number in {"crop_scale": 2, "crop_ratio": 2, "jitter": 4}.items():
            if len(getattr(self, name)) not in (0, number):
                raise ValueError(f"{name} takes {number} numbers; got {getattr(self, name)}.")
        if not self.crop_scale and (self.flip or any(self.jitter)):
            raise ValueError("flip and jitter belong to random crops: give --crop_scale too.")
        for name in ("crop_scale", "crop_ratio"):
            pair = getattr(self, name)
            if pair and not pair[0] <= pair[1]:
                raise ValueError(f"{name} takes the smaller number first; got {pair}.")
