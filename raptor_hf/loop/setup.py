"""Set up Accelerate for a training: processes, precision, compiled blocks."""

import importlib.util
import logging
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, TorchDynamoPlugin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from ..runs.processes import compiled, process_state
from .arguments import ComputeArguments, LoopArguments
from .optimizers import make_optimizers

logger = logging.getLogger(__name__)


def check_training(arguments: LoopArguments, num_rows: int) -> None:
    """Refuse what can't be trained; programs call it before the work that precedes `fit`.

    Raises:
        ValueError: fewer rows than a batch, or a tracker that is not installed.
    """
    if num_rows < arguments.batch_size:
        raise ValueError(
            f"--batch_size {arguments.batch_size} needs at least as many rows; the dataset has "
            f"{num_rows}."
        )
    tracker = arguments.report_to
    # Accelerate itself says nothing, and then a long run is not tracked
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(
            f"--report_to {tracker} needs its package: pip install {tracker}, or choose none "
            "(log.jsonl is written in any case)."
        )


def make_accelerator(arguments: LoopArguments) -> Accelerator:
    """Return Accelerate as its launcher configured it, with as few parts of a batch as fit."""
    process_state()  # the processes as our programs see them
    accelerator = Accelerator(
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
        # the schedule makes one step an update, whatever the number of processes
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),  # blocks instead of whole models
    )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32

    # as few parts as fit into a process; the launcher may ask for more
    if arguments.per_device_batch_size:
        images = math.ceil(arguments.batch_size / accelerator.num_processes)
        least = math.ceil(images / arguments.per_device_batch_size)
        num_parts = max(least, accelerator.gradient_accumulation_steps)
        accelerator.gradient_accumulation_steps = num_parts

    # say what was chosen
    if accelerator.is_main_process and 0 < arguments.steps <= arguments.warmup_steps:
        logger.warning(
            "--warmup_steps %d of a run of %d steps: it ends before it reaches --learning_rate %g.",
            arguments.warmup_steps, arguments.steps, arguments.learning_rate,
        )  # fmt: skip
    accelerator.print(
        f"{Path(arguments.output_dir).name}: {arguments.batch_size} images a step, in "
        f"{accelerator.num_processes} processes of {accelerator.gradient_accumulation_steps} parts",
        flush=True,
    )
    return accelerator


def prepare(
    accelerator: Accelerator, module: nn.Module, groups: list[dict], arguments: LoopArguments
) -> tuple[nn.Module, list[Optimizer], list[LRScheduler]]:
    """Return the module, its optimisers and their schedules, as Accelerate wraps them.

    Raises:
        ValueError: Muon for a module without matrices for it.
    """
    # bfloat16 where it is fast: on a GPU, or on a CPU that is asked for it
    fast = accelerator.device.type != "cpu" or accelerator.mixed_precision == "bf16"
    products = torch.bfloat16 if fast else torch.float32
    optimizers = make_optimizers(module, groups, arguments, products)

    # warm-up and cosine are factors: each group keeps its share of the learning rate
    least = arguments.final_learning_rate / arguments.learning_rate
    schedules = [
        get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, arguments.warmup_steps, arguments.steps, min_lr_rate=least
        )
        for optimizer in optimizers
    ]

    # each block is compiled by itself, if `--dynamo_backend` asks for it
    kinds = getattr(module, "_no_split_modules", None) or []
    for part in module.modules():
        if type(part).__name__ in kinds:
            part.forward = compiled(part.forward)
    model, *others = accelerator.prepare(module, *optimizers, *schedules)
    return model.train(), others[: len(optimizers)], others[len(optimizers) :]


def configure_compute(model: PreTrainedModel, compute: ComputeArguments) -> None:
    """Set the attention kernel of a model, and gradient checkpointing."""
    model.set_attn_implementation(compute.attn_implementation)
    if compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
