"""Writing an activation dataset: shards that are whole or absent, in parallel, resumable.

A shard that has its name is whole (`runs/shards.py`). So a killed run goes on with the shards that
have none, and when all have one their checksums are gathered in the manifest.
"""
# `write_activations` is over 40 lines: more than half of it is signature and docstring.

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data import ImageViews, keep_batch
from ..runs.files import size
from ..runs.folder import environment
from ..runs.processes import process_state, progress_bar
from ..runs.shards import (
    Shard,
    ShardPart,
    complete_dataset,
    missing_shards,
    plan_shards,
    remove_leftovers,
    write_manifest,
    write_shards,
)
from ..teachers import teacher_identity
from .format import (
    SCALARS,
    activation_features,
    dataset_card,
    layer_column,
)
from .online import OnlineActivations


class _Plan(NamedTuple):
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
    missing = missing_shards(path, plan.shards)
    needed = plan.row_bytes * sum(len(shard.rows) for shard in missing)
    state.print(
        f"{len(images):,} trajectories of {len(source.layers)} × {plan.num_tokens} × "
        f"{plan.num_channels} {dtype}: {size(plan.row_bytes * len(images))} in "
        f"{len(plan.shards)} shards, {len(missing)} of them to write",
        flush=True,
    )
    if state.is_main_process:
        remove_leftovers(path)
        _check_disk(path, needed)
    state.wait_for_everyone()
    own_shards = missing[state.process_index :: state.num_processes]
    batches = record_batches(source, plan, own_shards, batch_size, num_workers)
    write_shards(path, own_shards, plan.features.arrow_schema, batches)
    state.wait_for_everyone()
    if state.is_main_process:
        _complete(path, plan, source, dtype, revision)
    state.wait_for_everyone()


def make_plan(
    source: OnlineActivations,
    num_patches: int | None,
    dtype: str,
    batch_size: int,
    shard_megabytes: int,
) -> _Plan:
    """Return the sizes, schema and shards; a shard holds whole batches, at least one."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32'; got {dtype!r}.")
    _, num_layers, num_tokens, num_channels = source.states(source.images.first_batch()).shape
    if num_patches is not None:
        prefix = source.layout.num_prefix_tokens
        if not 1 <= num_patches <= num_tokens - prefix:
            raise ValueError(
                f"An image has {num_tokens - prefix} patches; asked to keep {num_patches}."
            )
        num_tokens = prefix + num_patches
    row_bytes = np.dtype(dtype).itemsize * num_layers * num_tokens * num_channels
    rows = max(1, shard_megabytes * 10**6 // (row_bytes * batch_size)) * batch_size
    shards = plan_shards(len(source), rows)
    features = activation_features(
        source.layers, num_tokens, num_channels, dtype=dtype, num_patches=num_patches
    )
    return _Plan(shards, num_tokens, num_channels, num_patches, features, row_bytes)


def _check_disk(path: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk can't hold."""
    free_bytes = shutil.disk_usage(path).free
    print(f"{size(needed_bytes)} to write, {size(free_bytes)} free in {path}", flush=True)
    if needed_bytes > 0.98 * free_bytes:
        raise OSError(
            f"{size(needed_bytes)} are to be written to {path}, but only {size(free_bytes)} are "
            f"free. Store less (--layers, --tokens, --num_images, "
            "--views), take another disk, or train with --activations online, which stores nothing."
        )


def record_batches(
    source: OnlineActivations, plan: _Plan, shards: list[Shard], batch_size: int, num_workers: int
) -> Iterator[ShardPart]:
    """Yield the batches of some shards, one after the other, and what is missing in them."""
    state = process_state()
    rows = [
        list(shard.rows[start : start + batch_size])
        for shard in shards
        for start in range(0, len(shard.rows), batch_size)
    ]
    loader = DataLoader(source, batch_sampler=rows, collate_fn=keep_batch, num_workers=num_workers)
    total = sum(map(len, rows))
    with progress_bar("extract", total, unit="image", enabled=state.is_main_process) as bar:
        for wanted, batch in zip(rows, loader, strict=True):
            skipped = batch.pop("skipped", torch.empty(0)).tolist()
            record = _record_batch(source, plan, batch) if len(batch["label"]) else None
            yield ShardPart(len(wanted), record, skipped)
            bar.update(len(wanted))


def _record_batch(source: OnlineActivations, plan: _Plan, batch: dict) -> pa.RecordBatch:
    """Return some trajectories as Arrow columns, without a detour by Python objects.

    Raises:
        ValueError: a number that the dtype can't hold, or NaN.
    """
    states, schema = source.states(batch), plan.features.arrow_schema
    kept, prefix = None, source.layout.num_prefix_tokens
    if plan.num_patches is not None:
        kept = _choose_patches(
            batch, states.shape[2] - prefix, plan.num_patches, source.images.seed
        )
        prefixes = torch.arange(prefix).expand(len(kept), -1)
        tokens = torch.cat([prefixes, prefix + kept], dim=1).to(states.device)
        images = torch.arange(len(kept), device=states.device)[:, None]
    columns = []
    for index, layer in enumerate(source.layers):
        layer_states = states[:, index] if kept is None else states[images, index, tokens]
        field = schema.field(layer_column(layer)).type
        dtype = getattr(torch, field.value_type)
        stored = layer_states.to(dtype).contiguous()
        _check_finite(stored, layer, batch["image_id"])
        columns.append(array2d(stored.cpu().numpy(), field))
    if kept is not None:
        flat = pa.array(kept.flatten().to(torch.int32).numpy())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, plan.num_patches))
    columns += [pa.array(batch[name].numpy()) for name in SCALARS]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _check_finite(states: torch.Tensor, layer: int, image_ids: torch.Tensor) -> None:
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


def _choose_patches(batch: dict, num_patches: int, wanted: int, seed: int) -> torch.Tensor:
    """Return the patches of each image that are kept, (B, wanted), from (seed, view, image)."""
    pairs = zip(batch["view"].tolist(), batch["image_id"].tolist(), strict=True)
    orders = [np.random.default_rng((seed, *pair)).permutation(num_patches) for pair in pairs]
    return torch.from_numpy(np.sort(np.stack(orders)[:, :wanted], axis=1))


def array2d(values: np.ndarray, field_type: pa.DataType) -> pa.Array:
    """Return (B, N, D) as Arrow's nested lists under `datasets`' Array2D type."""
    num_rows, num_tokens, num_channels = values.shape
    inner = np.arange(0, num_rows * num_tokens + 1, dtype=np.int32) * num_channels
    outer = np.arange(0, num_rows + 1, dtype=np.int32) * num_tokens
    lists = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
    return pa.ExtensionArray.from_storage(field_type, pa.ListArray.from_arrays(outer, lists))


def _complete(
    path: Path, plan: _Plan, source: OnlineActivations, dtype: str, revision: str | None
) -> None:
    """Complete a dataset whose shards are all there: `datasets`' own files, manifest and card."""
    shards = complete_dataset(path, plan.features, plan.shards)
    manifest = {
        "teacher": teacher_identity(source.whole_teacher, revision),
        **_image_facts(source.images, shards),
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
    (path / "README.md").write_text(dataset_card(manifest), encoding="utf-8")
    write_manifest(path, manifest)


def _image_facts(images: ImageViews, shards: dict[str, dict]) -> dict:
    """Return what a manifest says of the images.

    Raises:
        ValueError: all processes together have left out more than are tolerated.
    """
    skipped = sorted({image for facts in shards.values() for image in facts.get("skipped", [])})
    if len(skipped) > images.skip_corrupt:
        raise ValueError(
            f"{len(skipped)} images can't be read, the first is {images.public_path(skipped[0])}; "
            f"--skip_corrupt {images.skip_corrupt} are tolerated."
        )
    return {
        "num_images": len(images.image_ids) - len(skipped),
        "skipped_images": [{"image_id": i, "path": images.public_path(i)} for i in skipped],
        "class_names": images.class_names,
        "views": images.views,
        "seed": images.seed,
        "image_size": list(images.first_batch()["pixel_values"].shape[-2:]),
        "transform": images.processor.to_dict(),
    }
