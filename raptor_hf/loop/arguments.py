"""The arguments of every training program."""

from dataclasses import dataclass, field
from typing import Literal

from ..runs.arguments import check_not_negative, check_positive


@dataclass(kw_only=True)
class LoopArguments:
    """Arguments of every training program."""

    _argument_group_name = "loop"

    output_dir: str = field(metadata={"help": "folder for the result, its log and its checkpoints"})
    resume: bool = field(
        default=False, metadata={"help": "go on with an unfinished run in output_dir"}
    )
    steps: int = field(default=1000, metadata={"help": "optimiser updates"})
    batch_size: int = field(default=64, metadata={"help": "images a step, over all processes"})
    per_device_batch_size: int = field(
        default=0,
        metadata={"help": "most images in one pass of a process; 0: its whole share of a step"},
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={
            "help": "muon: orthogonalised updates for the matrices of blocks or layers, the best "
            "R² for the same compute; AdamW at an eighth of the rate for all other parameters"
        },
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    final_learning_rate: float = field(
        default=1e-6, metadata={"help": "end of the cosine schedule"}
    )
    weight_decay: float = 1e-4
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    seed: int = field(default=0, metadata={"help": "seed of initialisation, data order and noise"})
    log_every: int = field(
        default=20, metadata={"help": "steps between two lines of the log; 0: the last alone"}
    )
    checkpoint_every: int = field(
        default=200, metadata={"help": "steps between two checkpoints; 0: the last alone"}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "on one GPU, whole batches: record a step once and replay it, up to thrice "
            "as fast where the processor is the limit"
        },
    )
    num_workers: int = field(
        default=0, metadata={"help": "processes that prepare batches ahead; images need several"}
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="tensorboard", metadata={"help": "a tracker of Accelerate, or none"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print the plan of the run and its cost, then stop"}
    )

    def __post_init__(self):
        check_positive(self, "batch_size", "learning_rate")
        check_not_negative(self, "steps", "weight_decay", "warmup_steps", "per_device_batch_size")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                "--final_learning_rate must lie between 0 and --learning_rate, "
                f"{self.learning_rate}; got {self.final_learning_rate}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must lie between 0 and 2³² − 1; got {self.seed}.")


@dataclass(kw_only=True)
class ComputeArguments:
    """How the layers of a model are computed; the results are equal to rounding."""

    _argument_group_name = "compute"

    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "keep only the states between layers: less memory, a quarter more time"},
    )
