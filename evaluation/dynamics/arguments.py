"""What is done to trajectories: arguments."""

from dataclasses import dataclass, field

from raptor_hf.runs.arguments import Checked, NonNegative, Positive

# beside what needs nothing but trajectories (`dynamics.measure`), which is always made
ANALYSES = (
    "class_basins",
    "self_correction",
    "layer_swap",
    "phase_contrast",
    "more_time",
    "linear_modes",
)


@dataclass(kw_only=True)
class StudyArguments(Checked):
    """What is done to the trajectories."""

    _argument_group_name = "analyses"

    analyses: list[str] = field(
        default_factory=lambda: list(ANALYSES), metadata={"help": "which; default: all"}
    )
    push_groups: list[str] = field(
        default_factory=lambda: ["cls", "patches"],
        metadata={"help": "self-correction: tokens that are pushed: cls, registers, patches, all"},
    )
    push_layers: list[NonNegative[int]] = field(
        default_factory=list,
        metadata={"help": "self-correction: after which layers; default: 0, L/4, L/2, 3L/4"},
    )
    epsilons: list[Positive[float]] = field(
        default_factory=lambda: [0.01, 0.1, 0.5],
        metadata={"help": "self-correction: lengths of the push, as shares of the state's"},
    )
    swap_draws: Positive[int] = field(
        default=20, metadata={"help": "layer swap: random swaps of each kind"}
    )
    extra_applications: Positive[int] = field(
        default=12, metadata={"help": "more time: how often the last block is applied again"}
    )
    random_partitions: Positive[int] = field(
        default=100, metadata={"help": "phase contrast: random partitions to compare with"}
    )
    seed: NonNegative[int] = field(
        default=0, metadata={"help": "of the images, pushes, swaps and partitions"}
    )

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.analyses if name not in ANALYSES]
        if unknown:
            raise ValueError(f"--analyses are {', '.join(ANALYSES)}; got {', '.join(unknown)}.")
