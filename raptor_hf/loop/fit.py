"""The only training loop: teacher, blocks, Raptors and probes all go through `fit`.

Everything random is a function of (seed, step): the order of the data and the draws of a step. So a
run that is stopped and resumed computes the same as an uninterrupted one, bit for bit, and several
processes learn from the same batches as one.

The host waits for a GPU only to log; several processes also agree on stop signals in every step.
After a gradient that is not finite, the device itself leaves the weights as they are until the host
has noticed.
"""

import itertools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Dataset

from ..runs.processes import Interrupted, noted_stop_signals
from .arguments import LoopArguments
from .batches import StepSampler, open_batches
from .checkpoints import resume, save_checkpoint
from .graphs import StepGraphs, can_record
from .log import TrainingLog
from .optimizers import trained_parameters
from .scalars import FiniteCheck, StepResult, StepScalars
from .setup import check_training, make_accelerator, prepare

_MAX_NORM = 1.0  # of the gradients of a group, as published
ComputeLoss = Callable[[nn.Module, dict, float], StepResult]
StepKind = Callable[[float], Hashable]


class Validation(NamedTuple):
    """How a module is validated while it trains.

    Args:
        measure: returns scalars for the log; runs without gradients, leaves the module alone.
        every: steps between two validations; 0: after the last step alone.
    """

    measure: Callable[[], dict[str, float]]
    every: int = 0


def fit(
    module: nn.Module,
    dataset: Dataset,
    compute_loss: ComputeLoss,
    arguments: LoopArguments,
    *,
    groups: list[dict] | None = None,
    kind: StepKind | None = None,
    new_views: bool = False,
    validation: Validation | None = None,
) -> nn.Module:
    """Train a module with AdamW or Muon, linear warm-up, a cosine schedule, gradient clipping.

    Args:
        module: parameters that need no gradient are left alone.
        dataset: map-style; `__getitems__(rows)` returns a batch, a dict of tensors.
        compute_loss: (module, batch, progress in [0, 1)) to the loss, a mean over the images.
        arguments: checkpoints and `log.jsonl` go to its `output_dir`. The newest checkpoint there
            is loaded, whatever `resume` says: `start_run` looks at that.
        groups: as torch's optimisers take them, each clipped by itself; `lr` is a peak rate.
        kind: (progress) to the properties that a step depends on beside its batch; `cuda_graphs`
            records one step for each. Such a step must draw no random numbers. None: no recording.
        new_views: number the rows on from epoch to epoch (`StepSampler`).
        validation: at intervals and after the last step.

    Raises:
        Interrupted: a signal asked to stop, and the state was saved.
        FloatingPointError: the loss or a gradient is NaN or infinite.
        ValueError: fewer rows than a batch, or a batch that the processes can't share.
    """
    # a) Set up the processes, the optimisers and the data; load the newest checkpoint
    check_training(arguments, len(dataset))
    accelerator = make_accelerator(arguments)
    groups = groups or [{"params": trained_parameters(module)}]
    model, optimizers, schedules = prepare(accelerator, module, groups, arguments)
    first = resume(accelerator, arguments.output_dir)
    sampler = StepSampler(len(dataset), arguments, accelerator, first=first, new_views=new_views)
    backward = _make_backward(accelerator, model, compute_loss, arguments, kind)

    with (
        noted_stop_signals() as signals,
        open_batches(dataset, sampler, arguments, accelerator) as batches,
        TrainingLog(accelerator, arguments, first) as log,
    ):
        check = FiniteCheck(accelerator, dataset, sampler)
        for step in range(first, arguments.steps + 1):
            # b) At intervals and at the end: validate, save. A resumed run begins here
            last = step == arguments.steps
            parts = list(itertools.islice(batches, sampler.num_parts))
            stop = _agree(accelerator, signals)
            validating = validation and not stop and _is_due(validation.every, step, last)
            saving = stop or _is_due(arguments.checkpoint_every, step, last)
            if validating or saving:
                check.read()
                if validating:
                    module.eval()
                    with torch.no_grad():
                        log.write(step, validation.measure())
                    module.train()
                if saving and step > first:
                    save_checkpoint(accelerator, arguments.output_dir, step)
                log.restart_clock()
            if stop:
                raise Interrupted(stop, f"The state after step {step:,} is saved.")
            if last:
                break

            # c) Forward and backward: the gradients of the parts of a batch add up
            _seed_step(arguments.seed, step, accelerator.process_index)
            logging = _is_due(arguments.log_every, step + 1, step + 1 == arguments.steps)
            scalars = StepScalars(logging=logging)
            for part in parts:
                weight = len(next(iter(part.values()))) / arguments.batch_size
                batch = send_to_device(part, accelerator.device, non_blocking=True)
                result = backward(batch, step / arguments.steps, weight)
                scalars.add(result, weight)
                del result  # its predictions take memory that the next part needs

            # d) Clip and step. With `found_inf` the optimisers leave the weights as they are
            accelerator.unscale_gradients()
            norms = [nn.utils.clip_grad_norm_(group["params"], _MAX_NORM) for group in groups]
            found_inf = check.note(norms, step)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.optimizer.found_inf = found_inf
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

            # e) Log: only now the host waits for the device
            log.end_step()
            if logging:
                values = scalars.read(accelerator)
                check.read(values["loss"], step)
                log.write_step(step + 1, values, scalars.statistics, schedules[0])
    return module.eval()


def _make_backward(
    accelerator: Accelerator,
    model: nn.Module,
    compute_loss: ComputeLoss,
    arguments: LoopArguments,
    kind: StepKind | None,
) -> Callable[[dict, float, float], StepResult]:
    """Return `backward(batch, progress, weight)`, which adds the gradients of a part of a batch."""
    # Accelerate takes the mean over processes and parts, however many images each has
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps

    def backward(batch: dict, progress: float, weight: float = 1.0) -> StepResult:
        with accelerator.accumulate(model):
            result = compute_loss(model, batch, progress)
            accelerator.backward(result.loss * (weight * scale))
        return result.detached()

    if not (arguments.cuda_graphs and kind and can_record(accelerator, model)):
        return backward
    graphs = StepGraphs(backward, kind, trained_parameters(model))
    return lambda batch, progress, _weight: graphs(batch, progress)


def _agree(accelerator: Accelerator, signals: list[int]) -> int:
    """Return the stop signal that any process received, 0 if none: all stop after the same step."""
    first = next(iter(signals), 0)
    if accelerator.num_processes == 1:
        return first
    return int(accelerator.gather(torch.tensor([first], device=accelerator.device)).max())


def _is_due(every: int, step: int, last: bool) -> bool:
    """Return whether an event of every so many steps happens after `step` of them; 0: never."""
    return last or (every > 0 and step > 0 and step % every == 0)


def _seed_step(seed: int, step: int, process_index: int) -> None:
    """Make all draws of a step a function of (seed, step, process)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process_index)).generate_state(1)[0]))
