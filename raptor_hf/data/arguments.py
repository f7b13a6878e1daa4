"""How images are found and read: arguments of every program that reads some."""

from dataclasses import dataclass, field

from ..runs.arguments import Checked, NonNegative, Positive, Watching


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
