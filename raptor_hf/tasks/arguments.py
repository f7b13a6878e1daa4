"""What the targets of pixels in a dataset mean: arguments."""

from dataclasses import dataclass, field

from ..runs.arguments import check_not_negative, check_positive


@dataclass(kw_only=True)
class DenseArguments:
    """The column of masks or depth maps in a dataset, and the meaning of their numbers."""

    _argument_group_name = "masks and depth"

    target_column: str | None = field(
        default=None, metadata={"help": "column of masks or depth of a Hub dataset"}
    )
    class_names: str | None = field(
        default=None,
        metadata={"help": "file with the classes of masks: a name a line, or an id2label.json"},
    )
    first_label: int | None = field(
        default=None,
        metadata={"help": "number of the first class in masks, default 0, of ADE20k's layout 1"},
    )
    ignore_label: int = field(default=255, metadata={"help": "number in masks that is no class"})
    depth_unit_m: float | None = field(
        default=None, metadata={"help": "metres in one unit of depth images; 0.001: millimetres"}
    )

    def __post_init__(self):
        check_positive(self, "depth_unit_m")
        check_not_negative(self, "first_label", "ignore_label")
