"""Write an activation dataset: shards that are complete or absent, in parallel, resumable.

A shard is written under a temporary name; when all of it is on the disk its checksum is noted in a
file beside it, and it gets its name. When all shards are there, their checksums move to the
manifest, with which the dataset is finished.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data import ImageViews, keep_batch
from ..data.batching import init_worker
from ..data.views import first_batch
from ..runs.files import free_bytes, public_name, read_json, size, write_json
from ..runs.folder import environment, lock_folder, unlock_folder
from ..runs.processes import process_state, progress_bar
from ..teachers import teacher_identity
from .format import (
    MANIFEST,
    SCALARS,
    activation_features,
    array2d,
    checksum,
    dataset_card,
    layer_column,
    shard_problem,
)
from .online import OnlineActivations


def write_activations(
    teacher: PreTrainedModel,
    images: ImageViews,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    dtype: str = "float16",
    precision: str = "float32",
    batch_size: int = 64,
    shard_megabytes: int = 256,
    num_workers: int = 0,
    revision: str | None = None,
    dataset: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write the trajectories of all images and views, those shards that are not there yet.

    All processes work together: process p of P writes the shards p, p + P, …. A second call with
    the same arguments ends in the same bytes as one that was not interrupted.

    Args:
        layers: the layers to store; default: all.
        dtype: of the stored states, `"float16"` or `"float32"`.
        precision: of the teacher's forward pass, `"float32"` or `"bfloat16"`.
        batch_size: images in one forward pass, and in one record batch of a file.
        num_workers: processes that decode images ahead.
        revision: the Hub revision that the teacher was loaded at; its commit is noted.
        dataset: name of the images, for the manifest.
        dry_run: print the plan, and stop.

    Raises:
        ValueError: a state that the dtype can't hold (layer and image are named), a layer that the
            teacher has not, or another process that writes to the folder.
        OSError: less free disk than the dataset takes, or a disk that fills up.
    """
    path, state = Path(path), process_state()
    if state.is_main_process and not dry_run:
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        for leftover in path.glob("*.tmp"):  # of a run that was killed
            leftover.unlink()
    state.wait_for_everyone()

    # the first image shows how large a state is; a shard holds whole batches, at least one
    source = OnlineActivations(teacher, images, layers=layers, precision=precision)
    shape = source.states(first_batch(images)).shape[1:]
    features = activation_features(source.layers, *shape[1:], dtype)
    row_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    rows = max(1, shard_megabytes * 10**6 // (row_bytes * batch_size)) * batch_size
    starts, shards = range(0, len(images), rows), {}
    for index, start in enumerate(starts):
        name = f"data-{index:05d}-of-{len(starts):05d}.arrow"
        shards[name] = range(start, min(start + rows, len(images)))

    # each process looks after its share: what an earlier run wrote is compared with its checksum
    facts, missing = _shard_facts(path), {}
    for name in list(shards)[state.process_index :: state.num_processes]:
        if name not in facts or shard_problem(path / name, facts[name], checksums=True):
            missing[name] = shards[name]

    # the plan
    needed = row_bytes * sum(gather_object([sum(map(len, missing.values()))]))
    flop = 2 * len(images) * shape[1] * sum(w.numel() for w in source.teacher.parameters())
    free = free_bytes(path)
    state.print(
        f"{len(images):,} trajectories of {' × '.join(map(str, shape))} {dtype} in {len(shards)} "
        f"shards, about {flop:.3g} FLOP; {size(needed)} to write to {path}, {size(free)} free",
        flush=True,
    )
    if needed > 0.98 * free:
        raise OSError(
            f"{size(needed)} are to be written to {path}, but only {size(free)} are free. Store "
            "less (--layers, --num_images, --views), or train with --activations online."
        )
    if dry_run:
        return

    _write_shards(path, missing, source, features, batch_size, num_workers)
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = {
            "teacher": teacher_identity(teacher, revision),
            "dataset": public_name(dataset) if dataset else None,
            "num_tokens": shape[1],
            "num_channels": shape[2],
            "dtype": dtype,
        }
        _complete(path, list(shards), features, source, manifest)
        unlock_folder(path)
    state.wait_for_everyone()


def _shard_facts(path: Path) -> dict[str, dict]:
    """Return rows, size and checksum of every shard that was finished, by its name."""
    manifest = path / MANIFEST
    facts = read_json(manifest)["shards"] if manifest.exists() else {}
    for file in path.glob("data-*.json"):  # newer than the manifest: a shard written again
        facts[f"{file.stem}.arrow"] = read_json(file)
    return facts


def _write_shards(
    path: Path,
    shards: dict[str, range],
    source: OnlineActivations,
    features: datasets.Features,
    batch_size: int,
    num_workers: int,
) -> None:
    """Compute and write some shards, one after the other."""
    # one loader for all shards: its workers read on while a shard is put on the disk
    order = []
    for rows in shards.values():
        order += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = iter(
        DataLoader(
            source,
            batch_sampler=order,
            collate_fn=keep_batch,
            num_workers=num_workers,
            worker_init_fn=init_worker,
        )
    )
    total, shown = sum(map(len, order)), process_state().is_main_process
    with progress_bar("extract", total, unit="image", enabled=shown) as bar:
        for name, rows in shards.items():
            own = islice(batches, -(-len(rows) // batch_size))
            # a batch is empty where none of its images could be read
            records = (_record(source, features, b) for b in own if len(b["image_id"]))
            _write_shard(path / name, features.arrow_schema, records)
            bar.update(len(rows))


def _write_shard(path: Path, schema: pa.Schema, records: Iterator[pa.RecordBatch]) -> None:
    """Write a shard and its checksum; nothing is left of one that fails."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    rows = 0
    try:
        # all of it is on the disk before anything says that it is there
        with open(temporary, "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for record in records:
                    writer.write_batch(record)
                    rows += len(record)
            file.flush()
            os.fsync(file.fileno())

        # the checksum first: a shard that has its name has one
        facts = {"rows": rows, "size_bytes": temporary.stat().st_size}
        write_json(path.with_suffix(".json"), {**facts, "xxh3_128": checksum(temporary)})
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _record(source: OnlineActivations, features: datasets.Features, batch: dict) -> pa.RecordBatch:
    """Return the trajectories of a batch as Arrow columns, without a detour by Python objects."""
    states, schema, columns = source.states(batch), features.arrow_schema, []
    for index, layer in enumerate(source.layers):
        kind = schema.field(layer_column(layer)).type
        stored = states[:, index].to(getattr(torch, kind.value_type)).contiguous()
        # extremes are NaN or infinite if anything is, and take a twentieth of the time
        if not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
            finite = torch.isfinite(stored).flatten(1).all(dim=1).cpu()
            raise ValueError(
                f"The state after layer {layer} of image {int(batch['image_id'][~finite][0])} "
                f"holds NaN, or values that {kind.value_type} can't hold (--dtype float32)."
            )
        columns.append(array2d(stored.cpu().numpy(), kind))
    columns += [pa.array(batch[name].numpy()) for name in SCALARS]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _complete(
    path: Path,
    names: list[str],
    features: datasets.Features,
    source: OnlineActivations,
    manifest: dict,
) -> None:
    """Write `datasets`' own files, the card and the manifest beside shards that are all there."""
    # the files that `datasets.load_from_disk` reads
    facts, images = _shard_facts(path), source.images
    shards = {name: facts[name] for name in names}
    datasets.DatasetInfo(features=features).write_to_directory(str(path))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": shards[names[0]]["xxh3_128"][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_json(path / "state.json", state)

    # images that are in no shard could not be read
    stored = images.image_ids
    if sum(shard["rows"] for shard in shards.values()) < len(images):
        stored = np.unique(datasets.load_from_disk(str(path))["image_id"][:])
    skipped = np.setdiff1d(images.image_ids, stored).tolist()

    # the manifest comes last: with it the dataset is finished
    manifest |= {
        "num_images": len(images.image_ids) - len(skipped),
        "skipped_images": [{"image_id": i, "path": images.public_path(i)} for i in skipped],
        "class_names": images.class_names,
        "views": images.views,
        "seed": images.seed,
        "image_size": source.resolution,
        "transform": images.processor.to_dict(),
        "depth": source.depth,
        "layers": source.layers,
        "num_cls": source.layout.num_cls,
        "num_registers": source.layout.num_registers,
        "precision": source.precision,
        "environment": environment(),
        "shards": shards,
    }
    (path / "README.md").write_text(dataset_card(manifest), encoding="utf-8")
    write_json(path / MANIFEST, manifest)
    for file in path.glob("data-*.json"):  # the manifest holds them now
        file.unlink()
