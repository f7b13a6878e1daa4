"""Stored or online: what each would cost, from a short measurement on this machine."""
# `print_extraction_plan` is over 40 lines: a plan is a list of lines, in the order of the page.

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ..activations.arguments import ImageArguments
from ..data import ReadingArguments, choose_images
from ..distillation.arguments import parse_span
from ..distillation.compute import application_flops, teacher_layer
from ..runs.files import size
from ..runs.processes import process_state
from .describe import (
    cost,
    count_images,
    describe_images,
    describe_teacher,
    duration,
    measure_teacher,
    print_plan,
    teacher_facts,
)

_TEST_BYTES = 2**28  # enough that a disk's own cache does not answer alone


class _Rates(NamedTuple):
    """What a machine does in a second."""

    teacher: float  # images, all processes together
    write: float  # bytes
    read: float  # bytes that are not in memory


class _Job(NamedTuple):
    """What is to be extracted, and how often it will be read."""

    rows: int
    row_bytes: float  # stored
    epochs: float
    read_bytes: float  # of a row, in an epoch
    online_share: float  # of the teacher's layers, up to the last one that is learned


def _measure_disk(folder: Path) -> tuple[float, float]:
    """Measure bytes a second written to and read from a disk, past the memory cache."""
    chunk = os.urandom(2**24)
    number = max(1, min(_TEST_BYTES, shutil.disk_usage(folder).free // 10) // len(chunk))
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(number):
            file.write(chunk)
        os.fsync(file.fileno())
        write = number * len(chunk) / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):  # so that reading does not find it in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(chunk)):
            pass
        return write, number * len(chunk) / (time.perf_counter() - start)


def _stored_or_online(job: _Job, rates: _Rates, free_bytes: float) -> list[tuple[str, str]]:
    """Return both sums and which one is less, as lines of a plan.

    Extraction overlaps the teacher with the disk; an epoch of a store is read from the disk, one of
    the online teacher computed anew. Training itself costs the same either way and is left out.
    """
    stored_bytes = job.rows * job.row_bytes
    extract = max(job.rows / rates.teacher, stored_bytes / rates.write)
    epoch = job.rows * job.read_bytes / rates.read
    stored = extract + job.epochs * epoch
    online_epoch = job.rows * job.online_share / rates.teacher
    online = job.epochs * online_epoch
    lines = [
        (
            "stored",
            f"extract {duration(extract)} + {job.epochs:g} epochs × {duration(epoch)} = "
            f"{duration(stored)}, {size(stored_bytes)} of disk",
        ),
        (
            "online",
            f"{job.epochs:g} epochs × {duration(online_epoch)} = {duration(online)}, no disk",
        ),
    ]
    if stored_bytes > 0.98 * free_bytes:
        advice = f"online: the store needs {size(stored_bytes)}, {size(free_bytes)} are free"
    elif stored < online:
        advice = f"stored: {online / stored:.2g} times less for {size(stored_bytes)} of disk"
    else:
        advice = f"online: {stored / online:.2g} times less, and no disk"
        if online_epoch > epoch:
            break_even = extract / (online_epoch - epoch)
            advice += f"; from {break_even:.3g} epochs on, stored is less"
    return [*lines, ("advice", advice)]


def _existing_parent(path: str | Path) -> Path:
    """Return the folder itself, or the next one above it that there is."""
    path = Path(path).resolve()
    return path if path.exists() else _existing_parent(path.parent)


def print_extraction_plan(arguments, chosen: ImageArguments, reading: ReadingArguments) -> None:
    """Print what `extract_activations.py` would do, and whether it should.

    Nothing stays on the disk; the teacher's speed is that of its architecture with random weights.

    Args:
        arguments: the program's own.
        chosen, reading: which images, and how they are read.
    """
    facts = teacher_facts(arguments.teacher, arguments.revision, reading.resolution)
    depth = facts.config.num_hidden_layers
    layers = arguments.layers or list(range(depth + 1))
    tokens = facts.num_tokens
    state_bytes = {"float16": 2, "float32": 4}[arguments.dtype] * tokens * facts.config.hidden_size
    flop = max(layers) * application_flops(teacher_layer(facts.config), facts.num_tokens)
    folder = _existing_parent(arguments.output_dir)
    free = shutil.disk_usage(folder).free
    spans = [parse_span(text) for text in arguments.planned_spans] or [(0, depth)]
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    images = count_images(chosen.dataset, chosen.split)
    lines = [
        ("teacher", describe_teacher(arguments.teacher, facts)),
        ("reads", describe_images(chosen.dataset, chosen.split, at_most=chosen.num_images)),
        ("an image", f"{size(len(layers) * state_bytes)} ({len(layers)} states, "
                     f"{arguments.dtype}), {flop:.3g} FLOP"),
    ]  # fmt: skip
    if images is not None:
        images = len(choose_images(images, chosen.num_images, 0))
    rows = chosen.views * (images or 10**6)
    per = f"{rows:,} trajectories" if images else "1M images"
    lines += [
        ("compute", f"{per}; {cost(rows * flop)}"),
        ("writes", f"{arguments.output_dir}: {size(rows * len(layers) * state_bytes)}"
                   + ("" if images else " for 1M images")),
        ("free disk", f"{size(free)} in {folder}"),
    ]  # fmt: skip
    teacher_rate = measure_teacher(facts, arguments.batch_size, chosen.precision)
    rates = _Rates(teacher_rate, *_measure_disk(folder))
    job = _Job(
        rows=rows,
        row_bytes=len(layers) * state_bytes,
        epochs=arguments.planned_epochs,
        read_bytes=(last - first + 1) * state_bytes,
        online_share=last / depth,
    )
    lines += [
        ("measured", f"teacher {rates.teacher:,.1f} images/s ({process_state().device}), disk "
                     f"{size(rates.write)}/s written, {size(rates.read)}/s read"),
        ("planned", f"{job.epochs:g} epochs of the layers {first} to {last} "
                    "(--planned_epochs, --planned_spans)"),
        *_stored_or_online(job, rates, free),
    ]  # fmt: skip
    print_plan("Extract activations", lines)
