"""Set up Accelerate for a training: processes, precision, compiled blocks, trackers."""

import importlib.util
import math
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, TorchDynamoPlugin
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from ..runs.files import read_json
from ..runs.processes import compiled, process_state
from .arguments import ComputeArguments, LoopArguments
from .batches import BatchShare
from .checkpoints import check_room
from .optimizers import make_optimizers, make_schedule, trained_parameters


def make_accelerator(arguments: LoopArguments) -> tuple[Accelerator, BatchShare]:
    """Return Accelerate as its launcher configured it, and this process' share of a batch.

    Raises:
        ImportError: the tracker of `report_to` is not installed.
        ValueError: a batch that the processes can't share.
    """
    process_state()
    tracker = arguments.report_to
    # Accelerate itself only warns, and then a long run is not tracked
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ImportError(
            f"report_to={tracker!r} needs the package {tracker}: pip install {tracker}, or choose "
            "--report_to none (log.jsonl is written in any case)."
        )
    accelerator = Accelerator(
        log_with=None if tracker == "none" else tracker,
        project_dir=arguments.output_dir,
        # the schedule makes one step an update, whatever the number of processes
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),  # `_compile_blocks` instead of whole models
    )
    if accelerator.device.type == "cuda" and arguments.tf32:
        torch.set_float32_matmul_precision("high")

    # as few parts as the launcher and `per_device_batch_size` allow
    processes, num_parts = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if arguments.per_device_batch_size:
        images = math.ceil(arguments.batch_size / processes)
        num_parts = max(num_parts, math.ceil(images / arguments.per_device_batch_size))
    accelerator.gradient_accumulation_steps = num_parts
    share = BatchShare(arguments.batch_size, processes, accelerator.process_index, num_parts)
    accelerator.print(f"{Path(arguments.output_dir).name}: {share}", flush=True)
    return accelerator, share


def prepare(
    accelerator: Accelerator, module: nn.Module, groups: list[dict], arguments: LoopArguments
) -> tuple[nn.Module, list[Optimizer], list[LRScheduler]]:
    """Return the module, its optimisers and their schedules, as Accelerate wraps them.

    Raises:
        OSError: the disk has no room for the checkpoints.
        ValueError: Muon for a module without matrices for it.
    """
    check_room(arguments, trained_parameters(module))
    optimizers = make_optimizers(module, groups, arguments)
    schedules = [make_schedule(optimizer, arguments) for optimizer in optimizers]
    _compile_blocks(module)
    model, *others = accelerator.prepare(module, *optimizers, *schedules)
    return model.train(), others[: len(optimizers)], others[len(optimizers) :]


def _compile_blocks(module: nn.Module) -> None:
    """Compile each block of a module by itself, if `--dynamo_backend` asks for it."""
    kinds = getattr(module, "_no_split_modules", None) or []
    for part in module.modules():
        if type(part).__name__ in kinds:
            part.forward = compiled(part.forward)


def configure_compute(model: PreTrainedModel, compute: ComputeArguments) -> None:
    """Set the attention kernel of a model, and gradient checkpointing."""
    model.set_attn_implementation(compute.attn_implementation)
    if not compute.gradient_checkpointing:
        return
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # the same, in older versions of transformers
        model.gradient_checkpointing_enable({"use_reentrant": False})


def start_trackers(accelerator: Accelerator, arguments: LoopArguments, first: int) -> None:
    """Begin a run in its tracker, or go on with it.

    Args:
        first: updates before this process; TensorBoard drops the later ones.
    """
    output_dir, tracker = Path(arguments.output_dir), arguments.report_to
    # the arguments of the whole program where it noted them, else those of the loop
    record = output_dir / "run.json"
    values = read_json(record)["arguments"] if record.exists() else asdict(arguments)
    # one process names the run: of several the last to write would, and a resume find another
    identity = None
    if tracker in ("wandb", "trackio") and accelerator.is_main_process:
        identity = _tracker_id(output_dir)
    options = {
        "tensorboard": {"purge_step": first + 1} if first else {},
        "wandb": {
            "name": output_dir.name,
            "dir": arguments.output_dir,
            "id": identity,
            "resume": "allow",
        },
        "trackio": {"name": f"{output_dir.name}-{identity}", "resume": "allow"},
    }
    accelerator.init_trackers(
        "logs" if tracker == "tensorboard" else "raptor_hf",  # a folder, or a project
        config={name: str(value) for name, value in values.items()},
        init_kwargs=options,
    )


def _tracker_id(output_dir: Path) -> str:
    """Return the run's id in its tracker, which stays the same when the run is resumed."""
    path = output_dir / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
