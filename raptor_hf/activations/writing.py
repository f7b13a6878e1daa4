"""Write an activation dataset: shards that are complete or absent, in parallel, resumable.

A shard is written under a temporary name, and gets its own when all of it is on the disk. When all
shards are there, the manifest notes their checksums, and with it the dataset is finished.
"""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from datasets.features.features import numpy_to_pyarrow_listarray
from transformers import PreTrainedModel

from ..data import ImageViews
from ..data.batching import batch_loader
from ..runs.files import free_bytes, public_name, size, write_json
from ..runs.folder import environment, lock_folder, unlock_folder
from ..runs.processes import process_state, progress_bar
from ..teachers import teacher_identity
from .format import MANIFEST, SCALARS, dataset_card, read_manifest, shard_facts
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
    dataset: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write the trajectories of all images and views, those shards that are not there yet.

    Process p of P writes the shards p, p + P, …. A second call with the same arguments ends in the
    same bytes as one that was not interrupted.

    Args:
        layers, precision: as of `OnlineActivations`.
        dtype: of the stored states, `"float16"` or `"float32"`.
        batch_size: images in one forward pass, and in one record batch of a file.
        dataset: name of the images, for the manifest.
        dry_run: print the plan, and stop.

    Raises:
        ValueError: a state that the dtype can't hold (layer and image are named), a layer that the
            teacher has not, or another process that writes to the folder.
        OSError: less free disk than the dataset takes, or a disk that fills up.
    """
    # one writer a folder; what a killed run left goes
    path, state = Path(path), process_state()
    if state.is_main_process and not dry_run:
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        for leftover in path.glob("*.tmp"):
            leftover.unlink()
    state.wait_for_everyone()

    # a shard holds whole batches, at least one
    source = OnlineActivations(teacher, images, layers=layers, precision=precision)
    shape = (len(source.layers), source.num_tokens, source.num_channels)
    features = datasets.Features(dict.fromkeys(SCALARS, datasets.Value("int64")))
    for layer in source.layers:
        features[f"layer_{layer}"] = datasets.Array2D(shape[1:], dtype)
    row_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    number = max(1, shard_megabytes * 10**6 // (row_bytes * batch_size))
    rows, shards = range(len(images)), {}
    batches = [rows[start : start + batch_size] for start in rows[::batch_size]]
    starts = range(0, len(batches), number)
    for index, start in enumerate(starts):
        shards[f"data-{index:05d}-of-{len(starts):05d}.arrow"] = batches[start : start + number]

    # each process looks after its share; shards of a finished store are compared with its manifest
    facts, missing, noted = {}, {}, {}
    if (path / MANIFEST).exists():
        noted = read_manifest(path)["shards"]
    for name in list(shards)[state.process_index :: state.num_processes]:
        if (path / name).exists():
            facts[name] = shard_facts(path / name)
        if name not in facts or facts[name] != noted.get(name, facts[name]):
            missing[name] = shards[name]

    # the plan
    order = list(chain(*missing.values()))
    own_rows = sum(map(len, order))
    needed = row_bytes * sum(gather_object([own_rows]))
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

    # one loader for all shards: its workers read on while a shard is put on the disk
    loader, shown = batch_loader(source, order, num_workers), state.is_main_process
    records = (_record(source, features, batch) for batch in loader)
    with progress_bar("extract", own_rows, unit="image", enabled=shown) as bar:
        for name, shard in missing.items():
            own = islice(records, len(shard))
            facts[name] = _write_shard(path / name, features.arrow_schema, own)
            bar.update(sum(map(len, shard)))

    # collect the checksums of all processes
    written = {}
    for part in gather_object([facts]):
        written |= part

    # the manifest comes last: with it the dataset is finished
    if state.is_main_process:
        manifest = {
            "teacher": teacher_identity(teacher),
            "dataset": dataset and public_name(dataset),
            "num_images": len(images.image_ids),
            "class_names": images.class_names,
            "views": images.views,
            "seed": images.seed,
            "image_size": source.resolution,
            "depth": source.depth,
            "layers": source.layers,
            "num_cls": source.layout.num_cls,
            "num_registers": source.layout.num_registers,
            "dtype": dtype,
            "precision": precision,
            "environment": environment(),
            "shards": {name: written[name] for name in shards},
        }
        images.processor.save_pretrained(path)
        _write_descriptions(path, features, manifest)
        unlock_folder(path)
    state.wait_for_everyone()


def _write_shard(path: Path, schema: pa.Schema, records: Iterable[pa.RecordBatch]) -> dict:
    """Write a shard and return its facts; nothing is left of one that fails."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        # all of it is on the disk before it gets its name
        with open(temporary, "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for record in records:
                    writer.write_batch(record)
            file.flush()
            os.fsync(file.fileno())
        facts = shard_facts(temporary)
        os.replace(temporary, path)
        return facts
    finally:
        temporary.unlink(missing_ok=True)


def _record(source: OnlineActivations, features: datasets.Features, batch: dict) -> pa.RecordBatch:
    """Return the trajectories of a batch as Arrow columns, without a detour by Python objects."""
    states, schema = source.states(batch), features.arrow_schema
    columns = [pa.array(batch[name].numpy()) for name in SCALARS]
    for index, layer in enumerate(source.layers):
        kind = schema.field(f"layer_{layer}").type
        stored = states[:, index].to(getattr(torch, kind.value_type)).contiguous()
        # extremes are NaN or infinite if anything is, and take a twentieth of the time
        if not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
            finite = torch.isfinite(stored).flatten(1).all(dim=1).cpu()
            raise ValueError(
                f"The state after layer {layer} of image {int(batch['image_id'][~finite][0])} "
                f"holds NaN, or values that {kind.value_type} can't hold (--dtype float32)."
            )
        lists = numpy_to_pyarrow_listarray(stored.cpu().numpy())
        columns.append(pa.ExtensionArray.from_storage(kind, lists))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _write_descriptions(path: Path, features: datasets.Features, manifest: dict) -> None:
    """Write `datasets`' own files, the card and the manifest beside shards that are all there."""
    names = list(manifest["shards"])
    datasets.DatasetInfo(features=features).write_to_directory(str(path))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": manifest["shards"][names[0]]["xxh3_128"][:16],
        "_format_kwargs": {},
        "_output_all_columns": False,
    }
    state |= dict.fromkeys(("_format_columns", "_format_type", "_split"))
    write_json(path / "state.json", state)
    (path / "README.md").write_text(dataset_card(manifest), encoding="utf-8")
    write_json(path / MANIFEST, manifest)
