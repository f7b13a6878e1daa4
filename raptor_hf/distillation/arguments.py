"""Arguments of distillation: new blocks, the loss, validation."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..runs.arguments import check_not_negative, check_positive
from ..runs.files import read_json

_TOKEN_GROUPS = ("cls", "registers", "patches")
_FADING = 0.25  # share of the steps over which teacher forcing fades


@dataclass(kw_only=True)
class BlockArguments:
    """What new blocks look like and start from, see `make_raptor`."""

    _argument_group_name = "blocks"

    init: Literal["teacher", "random"] = field(
        default="teacher",
        metadata={"help": "start of blocks: the mean of their phase's layers, or random weights"},
    )
    ffn: str | None = field(
        default=None,
        metadata={
            "help": "swiglu, or the activation of an FFN without a gate; default: as the teacher's"
        },
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "hidden width of the FFN; default: as the teacher's"}
    )
    depth_scaling: bool = field(default=True, metadata={"help": "scale by the layer index"})
    block_norm_eps: float | None = field(
        default=None, metadata={"help": "eps of the blocks' LayerNorms; default: the teacher's"}
    )

    def __post_init__(self):
        check_positive(self, "intermediate_size", "block_norm_eps")


@dataclass(kw_only=True)
class ObjectiveArguments:
    """The loss that blocks are trained with."""

    _argument_group_name = "objective"

    objective: Literal["annealed", "autoregressive", "teacher_forcing"] = field(
        default="annealed",
        metadata={
            "help": "rollouts (autoregressive), single layers from the teacher's states "
            "(teacher_forcing), or from the second to the first over a quarter of the steps"
        },
    )
    phase_fraction: float = field(
        default=0.0,
        metadata={
            "help": "share of the steps, the first ones, in which every block of a Raptor rolls "
            "out from the teacher's state at the start of its phase; then from the first layer"
        },
    )
    normalize: Literal["none", "group"] = field(
        default="none",
        metadata={
            "help": "divide the error of a layer and token group by the variance of the teacher's "
            "states there"
        },
    )
    token_weights: str = field(
        default="none",
        metadata={"help": "weights of cls,registers,patches (0.45,0.10,0.45), or none: plain mean"},
    )
    quantize: int | None = field(
        default=None,
        metadata={
            "help": "round the matrices of a finished Raptor (--blocks) to so many bits, 2 to 8; "
            "it learns on with them"
        },
    )

    def __post_init__(self):
        parse_token_weights(self.token_weights)
        if self.quantize is not None and not 2 <= self.quantize <= 8:
            raise ValueError(f"--quantize takes 2 to 8 bits; got {self.quantize}.")
        if self.quantize and self.phase_fraction:
            raise ValueError(
                "--quantize is for a finished Raptor: give it as --blocks, and --phase_fraction 0."
            )
        if not 0 <= self.phase_fraction <= 1:
            raise ValueError(f"--phase_fraction must lie in [0, 1]; got {self.phase_fraction}.")
        if self.phase_fraction and self.objective == "teacher_forcing":
            raise ValueError(
                "--phase_fraction is for rollouts; --objective teacher_forcing has none."
            )

    def forcing(self, progress: float) -> float:
        """Return λ, the weight of teacher forcing, at a progress through the run in [0, 1)."""
        if self.objective == "annealed":
            return max(0.0, 1 - progress / _FADING)
        return float(self.objective == "teacher_forcing")

    def by_phases(self, progress: float) -> bool:
        """Return whether rollouts start anew with every span."""
        return progress < self.phase_fraction


@dataclass(kw_only=True)
class ValidationArguments:
    """On what, and how often, a training program validates; without a dataset it does not."""

    _argument_group_name = "validation"

    validation_dataset: str | None = field(
        default=None, metadata={"help": "digits, an image folder or a Hub id; none: no validation"}
    )
    validation_split: str = "test"
    validation_images: int = field(
        default=2048, metadata={"help": "images to look at, at most; 0: all"}
    )
    validate_every: int = field(
        default=0, metadata={"help": "steps between two validations; 0: only after the last step"}
    )

    def __post_init__(self):
        check_not_negative(self, "validation_images")


def parse_token_weights(text: str) -> dict[str, float] | None:
    """Parse `"0.45,0.10,0.45"` as weights of cls, registers and patches; `"none"` as None.

    Raises:
        ValueError: not three numbers, a negative one, or a sum of zero.
    """
    if text == "none":
        return None
    try:
        weights = list(map(float, text.split(",")))
    except ValueError:
        weights = []
    if len(weights) != 3 or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(
            "Token weights are three numbers ≥ 0 for cls, registers and patches, "
            f"like 0.45,0.10,0.45, or none; got {text!r}."
        )
    return dict(zip(_TOKEN_GROUPS, weights, strict=True))


def read_phases(file: str, k: int) -> list[int]:
    """Return the lengths of the k phases that `find_phases.py` wrote.

    Raises:
        ValueError: no partition into k phases.
    """
    partitions = read_json(file)["phases"]
    if str(k) not in partitions:
        raise ValueError(f"{file} has the partitions k = {', '.join(partitions)}; asked for {k}.")
    return partitions[str(k)]
