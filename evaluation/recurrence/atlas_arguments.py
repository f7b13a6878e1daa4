"""What is measured of every teacher of the atlas."""

from dataclasses import dataclass, field

from raptor_hf.runs.arguments import check_positive


@dataclass(kw_only=True)
class AtlasArguments:
    """How many images, which cuts, how their stability is found."""

    _argument_group_name = "what is measured"

    num_images: int = field(
        default=500, metadata={"help": "at most, drawn at random; the same ones for all teachers"}
    )
    k: list[int] = field(
        default_factory=lambda: [2, 3, 4, 5, 6],
        metadata={"help": "numbers of phases; those that exceed a teacher's layers are left out"},
    )
    methods: list[str] = field(
        default_factory=list,
        metadata={
            "help": "recursive, maxcut, ncut; default: maxcut, and before it recursive for "
            "teachers of up to 14 layers"
        },
    )
    resamples: int = field(
        default=200, metadata={"help": "bootstrap resamples of the images, for the stability"}
    )
    seed: int = field(default=0, metadata={"help": "of the images and resamples"})
    batch_size: int = field(default=16, metadata={"help": "images at a time"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})

    def __post_init__(self):
        check_positive(self, "num_images", "k", "resamples", "batch_size")
