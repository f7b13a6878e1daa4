"""What the training loop asks of Accelerate: processes, precision, sharding, trackers."""

import copy
import importlib.util
import uuid
from collections.abc import Callable, Hashable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, TorchDynamoPlugin
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from ..runs.processes import compiled, process_state
from .arguments import ComputeArguments, LoopArguments
from .checkpoints import check_room
from .graphs import StepGraphs
from .numbers import StepResult
from .optimizers import layer_matrices, make_optimizers, make_schedule, trained_parameters
from .sampler import BatchShare


class Engine:
    """A module that learns, as Accelerate's environment sets it up: its optimiser and its wrapper.

    FSDP and DeepSpeed take a module apart. What they get is a copy: `module`, which callers hold
    parts of, gets the weights back with `update_module`.

    Args:
        module: what learns.
        arguments: of the loop.
        clip_apart: parts of the module whose gradients are clipped each for itself.
        learning_rates: peak rates of these parts, instead of one for the whole module.

    Raises:
        ValueError: a batch that the processes can't share, or FSDP in its first version.
        ImportError: the tracker of `report_to` is not installed.
        OSError: a disk without room for checkpoints.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: LoopArguments,
        *,
        clip_apart: list[nn.Module] | None = None,
        learning_rates: list[float] | None = None,
    ):
        self.module, self.max_grad_norm = module, arguments.max_grad_norm
        self.accelerator, self.share = _make_accelerator(arguments)
        kind = self.accelerator.distributed_type
        self.deepspeed = kind == DistributedType.DEEPSPEED
        self.apart = self.deepspeed or kind == DistributedType.FSDP
        self.trained = copy.deepcopy(module) if self.apart else module
        _compile_repeated_parts(self.trained)
        names = {id(part): name for name, part in module.named_modules()}
        parts = [self.trained.get_submodule(names[id(p)]) for p in clip_apart or [module]]
        groups = parts if learning_rates else [self.trained]
        rates = learning_rates or [arguments.learning_rate]
        if arguments.optimizer == "muon" and self.apart:
            raise ValueError(
                "--optimizer muon needs whole matrices, which FSDP and DeepSpeed take apart: "
                "choose --optimizer adamw, or DDP."
            )
        matrices = layer_matrices(self.trained) if arguments.optimizer == "muon" else []
        optimizers = make_optimizers(
            [trained_parameters(part) for part in groups], rates, arguments, matrices
        )
        schedules = [make_schedule(optimizer, arguments) for optimizer in optimizers]
        prepared = self.accelerator.prepare(self.trained, *optimizers, *schedules)
        self.model = prepared[0]
        self.optimizers = prepared[1 : 1 + len(optimizers)]
        self.schedules = prepared[1 + len(optimizers) :]
        module.to(self.accelerator.device)
        self.clipped = [trained_parameters(part) for part in parts]  # FSDP has replaced them
        self.cuda_graphs = arguments.cuda_graphs and self._can_record()
        check_room(Path(arguments.output_dir), trained_parameters(module), arguments.keep)

    def _can_record(self) -> bool:
        """Return whether steps can be CUDA graphs: one GPU, whole batches, no checkpointing."""
        whole = self.share.num_processes == self.share.num_parts == 1
        on_gpu = self.accelerator.device.type == "cuda" and self.accelerator.scaler is None
        parts = self.trained.modules()  # checkpoints ask for the random state: not while recording
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in parts)
        return whole and on_gpu and not checkpointed

    def learner(
        self,
        compute_loss: Callable[[nn.Module, dict, float], StepResult],
        kind: Callable[[float], Hashable | None] | None = None,
    ) -> Callable[[dict, float, float], StepResult]:
        """Return what adds the gradients of (part of a batch, progress, its share of the batch).

        Args:
            compute_loss, kind: as for `fit`.
        """

        def learn(batch: dict, progress: float, weight: float = 1.0) -> StepResult:
            with self.accelerator.accumulate(self.model):
                result = compute_loss(self.model, batch, progress)
                # Accelerate takes the mean over processes and parts, however many images each has
                scale = weight * self.share.num_processes * self.share.num_parts
                self.accelerator.backward(result.loss * scale)
            return result.detached()

        if not self.cuda_graphs or kind is None:
            return learn
        graphs = StepGraphs(learn, kind, trained_parameters(self.trained))
        return lambda batch, progress, _weight: graphs(batch, progress)

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """Update the weights and the schedule once; not with a loss or gradients not finite.

        The device sees to that by itself, and nobody waits for it to know.

        Returns:
            Whether the weights were left alone, a scalar on the device.
        """
        scaled = self.accelerator.scaler is not None  # then infinite gradients are its business
        checked = [loss]
        if not self.deepspeed:  # which clips by itself, all gradients together
            self.accelerator.unscale_gradients()
            for parameters in self.clipped:
                norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                checked += [] if scaled else [norm.to(loss)]
        left_out = ~torch.stack(checked).isfinite().all()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            if not scaled and not self.apart:
                optimizer.optimizer.found_inf = left_out.float()
            if not (self.apart and left_out):  # sharded weights: here the number is waited for
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return left_out

    def learning_rate(self) -> float:
        """Return the rate of the first group in the next step."""
        return self.schedules[0].get_last_lr()[0]

    def update_module(self) -> None:
        """Give `module` the weights as they are now; all processes call it."""
        if not self.apart:
            return
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.module.load_state_dict(weights)
        for tensor in self.module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)

    def start_trackers(self, arguments: LoopArguments, first: int, tracked: dict | None) -> None:
        """Go on with this run in its tracker, or begin it.

        Args:
            tracked: what the tracker stores of the run beside its scalars.
            first: updates that were made before; what was tracked after them is dropped, where the
                tracker can.
        """
        name, tracker = Path(arguments.output_dir).name, arguments.report_to
        # one process names the run: of several the last to write would, and a resume find another
        identity = tracker_id(arguments.output_dir) if self.accelerator.is_main_process else None
        self.accelerator.init_trackers(
            "logs" if tracker == "tensorboard" else "raptor_hf",  # a folder, or a project
            config={key: str(value) for key, value in (tracked or asdict(arguments)).items()},
            init_kwargs={
                "tensorboard": {"purge_step": first + 1} if first else {},
                "wandb": {
                    "name": name,
                    "dir": arguments.output_dir,
                    "id": identity,
                    "resume": "allow",
                },
                "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
            },
        )


def _make_accelerator(arguments: LoopArguments) -> tuple[Accelerator, BatchShare]:
    """Return Accelerate as its environment sets it up, and how the processes share a batch."""
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
        dynamo_plugin=TorchDynamoPlugin(backend="no"),  # see `_compile_repeated_parts`
    )
    if accelerator.device.type == "cuda" and arguments.tf32:
        torch.set_float32_matmul_precision("high")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP is supported in its second version: set fsdp_version to 2.")
    share = BatchShare.of_at_most(
        arguments.batch_size,
        largest_part=arguments.per_device_batch_size,
        least_parts=accelerator.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    accelerator.gradient_accumulation_steps = share.num_parts
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": share.largest_part,
            "gradient_accumulation_steps": share.num_parts,
            "gradient_clipping": arguments.max_grad_norm,
        }
    return accelerator, share


def configure_compute(model: PreTrainedModel, compute: ComputeArguments) -> None:
    """Make a model's layers compute as the arguments say."""
    model.set_attn_implementation(compute.attn_implementation)
    if not compute.gradient_checkpointing:
        return
    options = {"use_reentrant": False}
    if compute.keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # what older transformers call it
        model.gradient_checkpointing_enable(options)


def _keep_attention(_context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Keep the output of a fused attention, of whichever kernel; work out all else again."""
    fused = "scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if fused else CheckpointPolicy.PREFER_RECOMPUTE


def _compile_repeated_parts(module: nn.Module) -> None:
    """Compile the blocks of a module, each for itself, if `--dynamo_backend` asks for it."""
    kinds = getattr(module, "_no_split_modules", None) or []
    for part in module.modules():
        if type(part).__name__ in kinds:
            part.forward = compiled(part.forward)


def tracker_id(output_dir: str | Path) -> str:
    """Return the identity of a run in its tracker, which stays the same when it is resumed."""
    path = Path(output_dir) / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
