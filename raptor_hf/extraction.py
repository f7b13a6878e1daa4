"""Writing an activation dataset: shards that are whole or absent, in parallel, resumable.

A shard is written under a temporary name; its checksum is written down beside it, and then it gets
its name. So what has a name is whole, a killed run goes on with the shards that have none, and when
all have one their checksums are gathered in the manifest.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .activation_format import (
    MANIFEST,
    SCALARS,
    activation_features,
    dataset_card,
    layer_column,
    shard_digest,
    shard_problem,
)
from .activation_sources import OnlineActivations
from .data import ImageViews, keep_batch
from .runs import environment, process_state, progress_bar, read_json, size, write_json
from .teachers import teacher_identity

WAITING_BATCHES = 2  # computed ahead of the disk, at most: memory stays where it is


class Shard(NamedTuple):
    """A file of the dataset and the rows that it holds."""

    name: str
    rows: range


class Plan(NamedTuple):
    """What a dataset holds, and in which files; a function of the arguments alone."""

    shards: list[Shard]
    num_tokens: int
    num_channels: int
    num_patches: int | None
    features: datasets.Features
    row_bytes: int


def write_activations(
    teacher: PreTrainedModel,
    images: ImageViews,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    num_patches: int | None = None,
    dtype: str = "float16",
    precision: str = "float32",
    batch_size: int = 64,
    shard_megabytes: int = 256,
    num_workers: int = 0,
    revision: str | None = None,
) -> None:
    """Write the trajectories of all images and views, those shards that are not there yet.

    All processes work together: of the shards that are missing, process p of P writes p, p + P, ….
    A second call with the same arguments ends in the same bytes as one that was not interrupted.

    Args:
        path: folder of the dataset.
        layers: whose states are stored; default: all.
        num_patches: store so many patches of an image, drawn at random from (seed of the views,
            view, image), the same in all layers; default: all. Cls and registers are always stored.
        dtype: `"float16"` or `"float32"`.
        precision: what the teacher computes in, `"float32"` or `"bfloat16"`.
        batch_size: images in one forward pass, and in one record batch of a file.
        shard_megabytes: size of a file.
        num_workers: processes that decode images ahead.
        revision: the Hub revision that the teacher was loaded at; its commit is written down.

    Raises:
        ValueError: a state that the dtype can't hold (layer and image are named), or more patches
            or layers than there are.
        OSError: less free disk than the dataset takes, or a disk that is full before its end.
    """
    path, state = Path(path), process_state()
    source = OnlineActivations(teacher, images, layers=layers, precision=precision)
    plan = make_plan(source, num_patches, dtype, batch_size, shard_megabytes)
    known = known_shards(path)
    missing = [s for s in plan.shards if shard_problem(path / s.name, known.get(s.name))]
    needed = plan.row_bytes * sum(len(shard.rows) for shard in missing)
    state.print(
        f"{len(images):,} trajectories of {len(source.layers)} × {plan.num_tokens} × "
        f"{plan.num_channels} {dtype}: {size(plan.row_bytes * len(images))} in "
        f"{len(plan.shards)} shards, {len(missing)} of them to write",
        flush=True,
    )
    if state.is_main_process:
        for leftover in path.glob("*.tmp"):  # of a run that was killed
            leftover.unlink()
        check_disk(path, needed)
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    write_shards(path, mine, plan, record_batches(source, plan, mine, batch_size, num_workers))
    state.wait_for_everyone()
    if state.is_main_process:
        complete(path, plan, source, dtype, revision)
    state.wait_for_everyone()


def make_plan(
    source: OnlineActivations,
    num_patches: int | None,
    dtype: str,
    batch_size: int,
    shard_megabytes: int,
) -> Plan:
    """Sizes, schema and shards; a shard holds whole batches, at least one."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32'; got {dtype!r}.")
    _, num_layers, num_tokens, num_channels = source.states(source.__getitems__([0])).shape
    if num_patches is not None:
        prefix = source.layout.num_prefix_tokens
        if not 1 <= num_patches <= num_tokens - prefix:
            raise ValueError(
                f"An image has {num_tokens - prefix} patches; asked to keep {num_patches}."
            )
        num_tokens = prefix + num_patches
    row_bytes = np.dtype(dtype).itemsize * num_layers * num_tokens * num_channels
    rows = max(1, shard_megabytes * 10**6 // (row_bytes * batch_size)) * batch_size
    starts = range(0, len(source), rows)
    shards = [
        Shard(f"data-{i:05d}-of-{len(starts):05d}.arrow", range(s, min(s + rows, len(source))))
        for i, s in enumerate(starts)
    ]
    features = activation_features(
        source.layers, num_tokens, num_channels, dtype=dtype, num_patches=num_patches
    )
    return Plan(shards, num_tokens, num_channels, num_patches, features, row_bytes)


def check_disk(path: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk can't hold."""
    free_bytes = shutil.disk_usage(path).free
    print(f"{size(needed_bytes)} to write, {size(free_bytes)} free in {path}", flush=True)
    if needed_bytes > 0.98 * free_bytes:
        raise OSError(
            f"{size(needed_bytes)} are to be written to {path}, but only {size(free_bytes)} are "
            f"free. Store less (--layers, --tokens, --num_images, "
            "--views), take another disk, or train with --activations online, which stores nothing."
        )


def known_shards(path: Path) -> dict[str, dict]:
    """Size and checksum of every shard that was ever finished, by its name."""
    manifest = path / MANIFEST
    known = read_json(manifest)["shards"] if manifest.exists() else {}
    # newer than what a manifest says: a shard that was written again
    return known | {f"{file.stem}.arrow": read_json(file) for file in path.glob("data-*.json")}


def record_batches(
    source: OnlineActivations, plan: Plan, shards: list[Shard], batch_size: int, num_workers: int
) -> Iterator[pa.RecordBatch]:
    """The batches of some shards, one after the other."""
    state = process_state()
    rows = [
        list(shard.rows[start : start + batch_size])
        for shard in shards
        for start in range(0, len(shard.rows), batch_size)
    ]
    loader = DataLoader(source, batch_sampler=rows, collate_fn=keep_batch, num_workers=num_workers)
    total = sum(map(len, rows))
    with progress_bar("extract", total, unit="image", enabled=state.is_main_process) as bar:
        for batch in loader:
            yield record_batch(source, plan, batch)
            bar.update(len(batch["label"]))


def record_batch(source: OnlineActivations, plan: Plan, batch: dict) -> pa.RecordBatch:
    """Some trajectories as Arrow columns, without a detour by Python objects.

    Raises:
        ValueError: a number that the dtype can't hold, or NaN.
    """
    states, schema = source.states(batch), plan.features.arrow_schema
    kept, prefix = None, source.layout.num_prefix_tokens
    if plan.num_patches is not None:
        kept = choose_patches(batch, states.shape[2] - prefix, plan.num_patches, source.images.seed)
        prefixes = torch.arange(prefix).expand(len(kept), -1)
        tokens = torch.cat([prefixes, prefix + kept], dim=1).to(states.device)
        images = torch.arange(len(kept), device=states.device)[:, None]
    columns = []
    for index, layer in enumerate(source.layers):
        layer_states = states[:, index] if kept is None else states[images, index, tokens]
        field = schema.field(layer_column(layer)).type
        dtype = getattr(torch, field.value_type)
        stored = layer_states.to(dtype).contiguous()
        check_finite(stored, layer, batch["image_id"])
        columns.append(array2d(stored.cpu().numpy(), field))
    if kept is not None:
        flat = pa.array(kept.flatten().to(torch.int32).numpy())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, plan.num_patches))
    columns += [pa.array(batch[name].numpy()) for name in SCALARS]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def check_finite(states: torch.Tensor, layer: int, image_ids: torch.Tensor) -> None:
    """Refuse states (B, N, D) with NaN or ±∞, which is what becomes of too large a number."""
    # extremes are NaN if anything is, and are found 20 times faster than by looking at every number
    if torch.isfinite(torch.stack(torch.aminmax(states))).all():
        return
    finite = torch.isfinite(states).flatten(1).all(dim=1).cpu()
    dtype = str(states.dtype).removeprefix("torch.")
    raise ValueError(
        f"The state after layer {layer} of image {int(image_ids[~finite][0])} holds values that "
        f"{dtype} can't (beyond ±{torch.finfo(states.dtype).max:.5g}, or NaN)."
        + (" Extract with --dtype float32." if dtype == "float16" else "")
    )


def choose_patches(batch: dict, num_patches: int, wanted: int, seed: int) -> torch.Tensor:
    """Which patches of each image are kept, in order: (B, wanted), from (seed, view, image)."""
    pairs = zip(batch["view"].tolist(), batch["image_id"].tolist(), strict=True)
    orders = [np.random.default_rng((seed, *pair)).permutation(num_patches) for pair in pairs]
    return torch.from_numpy(np.sort(np.stack(orders)[:, :wanted], axis=1))


def array2d(values: np.ndarray, field_type: pa.DataType) -> pa.Array:
    """(B, N, D) as Arrow's nested lists under `datasets`' Array2D type."""
    num_rows, num_tokens, num_channels = values.shape
    inner = np.arange(0, num_rows * num_tokens + 1, dtype=np.int32) * num_channels
    outer = np.arange(0, num_rows + 1, dtype=np.int32) * num_tokens
    lists = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
    return pa.ExtensionArray.from_storage(field_type, pa.ListArray.from_arrays(outer, lists))


def write_shards(
    path: Path, shards: list[Shard], plan: Plan, batches: Iterator[pa.RecordBatch]
) -> None:
    """Write batches to the shards that they belong to, while the next ones are computed.

    Raises:
        OSError: the disk is full, or writing fails otherwise; what is whole is kept.
    """
    waiting = deque()

    def wait(at_most: int) -> None:
        while len(waiting) > at_most:
            try:
                waiting.popleft().result()
            except OSError as error:
                whole = sum((path / shard.name).exists() for shard in plan.shards)
                raise OSError(
                    error.errno,
                    f"{path} could not be written ({error.strerror or error}). {whole} of "
                    f"{len(plan.shards)} shards are whole and kept: make room and run the same "
                    "command with --resume.",
                ) from error

    try:
        # one thread each keeps the order; a shard is put on the disk while the next is written
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as publishing:
            for shard in shards:
                file = ShardFile(path / shard.name, plan.features.arrow_schema, len(shard.rows))
                rows = 0
                while rows < len(shard.rows):
                    batch = next(batches)
                    rows += len(batch)
                    waiting.append(writing.submit(file.write, batch))
                    wait(WAITING_BATCHES)
                waiting.append(publishing.submit(file.publish, waiting[-1]))
            wait(0)
    except BaseException:
        for shard in shards:  # the room of unfinished ones
            temporary_name(path / shard.name).unlink(missing_ok=True)
        raise


def temporary_name(shard: Path) -> Path:
    """What a shard is called until it is whole."""
    return shard.with_suffix(".tmp")


class ShardFile:
    """An Arrow file that gets its name when all of it is on the disk and its checksum is known."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        self.path, self.rows, self.written = path, rows, 0
        self.file = pa.OSFile(str(temporary_name(path)), "wb")
        self.writer = pa.ipc.new_stream(self.file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a record batch."""
        self.writer.write_batch(batch)
        self.written += len(batch)

    def publish(self, last_write: Future) -> None:
        """Close the file, put it on the disk, write down its checksum, give it its name.

        Args:
            last_write: of this file; it is waited for, and what it raised is raised again.

        Raises:
            RuntimeError: rows are missing, as after a write that failed: no name then.
        """
        last_write.result()
        if self.written != self.rows:
            raise RuntimeError(f"{self.path} has {self.written} of {self.rows} rows.")
        self.writer.close()
        self.file.close()
        temporary = temporary_name(self.path)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        facts = {"rows": self.rows, "size_bytes": temporary.stat().st_size}
        facts["xxh3_128"] = shard_digest(temporary)
        write_json(self.path.with_suffix(".json"), facts)
        os.replace(temporary, self.path)


def complete(
    path: Path, plan: Plan, source: OnlineActivations, dtype: str, revision: str | None
) -> None:
    """Complete a dataset whose shards are all there: `datasets`' own files, manifest and card."""
    known = known_shards(path)
    shards = {shard.name: known[shard.name] for shard in plan.shards}
    datasets.DatasetInfo(features=plan.features).write_to_directory(str(path))
    write_json(
        path / "state.json",
        {
            "_data_files": [{"filename": name} for name in shards],
            "_fingerprint": next(iter(shards.values()))["xxh3_128"][:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )
    images = source.images
    manifest = {
        "teacher": teacher_identity(source.whole_teacher, revision),
        "num_images": len(images.image_ids),
        "views": images.views,
        "seed": images.seed,
        "image_size": list(images[0]["pixel_values"].shape[-2:]),
        "transform": images.processor.to_dict(),
        "depth": source.depth,
        "layers": source.layers,
        "num_tokens": plan.num_tokens,
        "num_channels": plan.num_channels,
        "num_patches": plan.num_patches,
        "num_cls": source.layout.num_cls,
        "num_registers": source.layout.num_registers,
        "dtype": dtype,
        "precision": source.precision,
        "environment": environment(),
        "shards": shards,
    }
    (path / "README.md").write_text(dataset_card(manifest))
    write_json(path / MANIFEST, manifest)
    for entry in path.glob("data-*.json"):
        entry.unlink()
