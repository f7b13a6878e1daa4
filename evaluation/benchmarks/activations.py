"""The activation dataset beside other ways to keep the same numbers, and its memory."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.activations.format import activation_features
from raptor_hf.activations.store import StoredActivations, load_activations
from raptor_hf.activations.writing import plan_shards, write_activations, write_shards
from raptor_hf.configuration_raptor import token_layout
from raptor_hf.data import ImageViews, make_processor

from .settings import TEACHERS
from .timing import interleaved, median_ratio, peak_memory

_BATCH = 64


def grey_images(number: int, *, size: int = 8) -> ImageViews:
    """Return random images of size × size pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(number, size, size), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    columns = {"image": list(pixels), "label": [0] * number}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return ImageViews(dataset, make_processor(size))


def extract(teacher: str, number: int, path: Path, batch_size: int = _BATCH) -> None:
    """Write the activations of random images and a random teacher, one of `TEACHERS`."""
    shape = TEACHERS[teacher]
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**shape, num_register_tokens=4, mlp_ratio=1)
    path.mkdir(parents=True)
    images = grey_images(number, size=shape["image_size"])
    write_activations(Dinov2WithRegistersModel(config).eval(), images, path, batch_size=batch_size)


def read_all(path: Path) -> None:
    """Read random batches of an activation dataset, every image once."""
    activations = load_activations(path)
    order = np.random.default_rng(0).permutation(len(activations))
    for rows in np.array_split(order, -(-len(order) // _BATCH)):
        activations.__getitems__(rows)


class _GivenStates(Dataset):
    """A source whose states cost nothing, so that writing is what is measured."""

    def __init__(self, states: torch.Tensor, number: int):
        self.given, self.number = states, number
        self.layers = list(range(states.shape[1]))
        self.layout = token_layout(Dinov2WithRegistersConfig())

    def __len__(self) -> int:
        return self.number

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(rows) for name in ("label", "image_id", "view")}

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the same states for every batch."""
        return self.given[: len(batch["label"])]


def _compare_reading(
    activations: StoredActivations, folder: Path, layers: slice, rounds: int
) -> dict[str, float]:
    """Return how many times longer others take for random batches than `StoredActivations`.

    Beside it: `np.memmap` of the same bytes with the same gather, `datasets`' own torch format, and
    the reference's store and batches (zarr v2, zstd-3 and shuffle, chunks of 128 images and one
    layer, float32, 64 images that lie together), which has to deliver float32.
    """
    import zarr

    number, layers_read = len(activations), activations.layers[layers]
    ours = load_activations(activations.path, layers=layers_read)
    ours32 = load_activations(activations.path, layers=layers_read, dtype=torch.float32)
    flat = np.memmap(folder / "flat.bin", dtype=np.float16, mode="r")
    flat = flat.reshape(number, len(activations.layers), *ours[0]["states"].shape[1:])
    columns = [f"layer_{layer}" for layer in layers_read]
    stock = datasets.load_from_disk(str(activations.path)).select_columns(columns)
    stock = stock.with_format("torch")
    reference = zarr.open(str(folder / "reference.zarr"), mode="r")

    def rows(visit: int) -> np.ndarray:
        return np.random.default_rng(visit).permutation(number)[:_BATCH]

    def slab(visit: int) -> slice:
        start = _BATCH * (visit % (number // _BATCH))
        return slice(start, start + _BATCH)

    candidates = {
        "ours": lambda visit: ours.__getitems__(rows(visit)),
        "ours again": lambda visit: ours.__getitems__(rows(visit)),
        "np.memmap": lambda visit: torch.from_numpy(flat[rows(visit), layers]),
        "torch format": lambda visit: stock[rows(visit)],
        "ours, float32": lambda visit: ours32.__getitems__(rows(visit)),
        "reference": lambda visit: torch.from_numpy(reference[slab(visit), layers]),
    }
    states = candidates["ours"](0)["states"]
    assert torch.equal(states, candidates["np.memmap"](0)), "all must deliver the same numbers"
    assert torch.equal(candidates["torch format"](0)[columns[-1]], states[:, -1].float())
    together = ours32.__getitems__(range(_BATCH))["states"]
    assert torch.equal(together, candidates["reference"](0))
    times = interleaved(candidates, rounds=rounds)
    return {
        "np.memmap": median_ratio(times, "np.memmap", "ours"),
        "torch format": median_ratio(times, "torch format", "ours"),
        "reference": median_ratio(times, "reference", "ours, float32"),
        "ours again": median_ratio(times, "ours again", "ours"),
        "images_per_second": _BATCH / float(np.median(times["ours"])),
    }


def _compare_writing(states: torch.Tensor, folder: Path, number: int, rounds: int) -> dict:
    """Return how many times longer a plain file takes than shards with checksums.

    All end on the disk (fsync).
    """
    source = _GivenStates(states, number)
    features = activation_features(source.layers, *states.shape[2:], "float16")
    row_bytes = states[0].numel() * 2
    shards = plan_shards(number, max(1, 256 * 10**6 // (row_bytes * _BATCH)) * _BATCH)
    (folder / "ours").mkdir()

    def ours(_visit: int) -> None:
        write_shards(folder / "ours", shards, source, features, _BATCH)

    def plain(_visit: int) -> None:
        for rows in shards.values():
            with open(folder / "plain.bin", "wb", buffering=0) as file:
                for _ in range(0, len(rows), _BATCH):
                    file.write(memoryview(states.numpy()).cast("B"))
                os.fsync(file.fileno())

    times = interleaved({"ours": ours, "ours again": ours, "plain": plain}, rounds=rounds)
    seconds = float(np.median(times["ours"]))
    return {
        "plain file": median_ratio(times, "plain", "ours"),
        "ours again": median_ratio(times, "ours again", "ours"),
        "gigabytes_per_second": number * row_bytes / seconds / 1e9,
    }


def _write_others(activations: StoredActivations, folder: Path) -> None:
    """Write the same numbers as one flat file, and in the reference's layout."""
    import zarr
    from numcodecs import Blosc

    number, shape = len(activations), activations[0]["states"].shape
    reference = zarr.open(
        str(folder / "reference.zarr"),
        mode="w",
        shape=(number, *shape),
        chunks=(128, 1, *shape[1:]),
        dtype="f4",
        compressor=Blosc(cname="zstd", clevel=3, shuffle=Blosc.SHUFFLE),
    )
    with open(folder / "flat.bin", "wb") as file:
        for start in range(0, number, 128):
            rows = range(start, min(start + 128, number))
            states = activations.__getitems__(rows)["states"]
            file.write(states.numpy().tobytes())
            reference[start : rows.stop] = states.float().numpy()


def _read_onto(device: str, activations: StoredActivations, rounds: int) -> dict[str, float]:
    """Return gigabytes a second of random batches in main memory, and on a GPU from there."""
    pinned = torch.empty_like(activations.__getitems__(range(_BATCH))["states"]).pin_memory()

    def read(visit: int) -> torch.Tensor:
        rows = np.random.default_rng(visit).permutation(len(activations))[:_BATCH]
        return activations.__getitems__(rows)["states"]

    def onto(visit: int, *, pin: bool) -> None:
        states = pinned.copy_(read(visit)) if pin else read(visit)
        states.to(device, non_blocking=pin)
        torch.cuda.synchronize()

    ways = {"read": read, "and copied": partial(onto, pin=False), "pinned": partial(onto, pin=True)}
    times = interleaved(ways, rounds=rounds)
    return {
        name: pinned.nbytes / float(np.median(seconds)) / 1e9 for name, seconds in times.items()
    }


def benchmark_activations(
    teacher: str, number: int, rounds: int, folder: Path, device: str = "cpu"
) -> Iterator[tuple[str, dict]]:
    """Yield all ratios at one size; `folder` is emptied afterwards.

    Args:
        device: `"cuda"` adds what it takes to bring batches there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        extract(teacher, number, folder / "store")
        activations = load_activations(folder / "store")
        if device == "cuda":
            row = _read_onto(device, activations, rounds)
            yield "onto the device: gigabytes a second", row
        _write_others(activations, folder)
        yield "reading, all layers", _compare_reading(activations, folder, slice(None), rounds)
        yield "reading, 4 layers", _compare_reading(activations, folder, slice(7, 11), rounds)
        states = activations.__getitems__(range(_BATCH))["states"]
        del activations
        for name in ("flat.bin", "reference.zarr", "store"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield "writing", _compare_writing(states, folder, number, max(2, rounds // 2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def benchmark_memory(sizes: dict[str, list[int]], folder: Path) -> Iterator[tuple[str, dict]]:
    """Yield the peak memory in megabytes of writing and of reading, for every teacher and number of
    images.

    Batches are of 16 images: few enough that the smallest number fills all that wait in line.

    Args:
        sizes: numbers of images for every one of `TEACHERS`.
    """
    for teacher, numbers in sizes.items():
        for number in numbers:
            path = folder / f"{teacher}_{number}"
            shutil.rmtree(path, ignore_errors=True)
            work: dict[str, tuple[Callable, ...]] = {
                "writing": (extract, teacher, number, path, 16),
                "reading": (read_all, path),
            }
            peaks = {name: round(peak_memory(*job) / 1e6) for name, job in work.items()}
            stored = sum(file.stat().st_size for file in path.iterdir())
            shutil.rmtree(path)
            yield f"{teacher}, {number} images", {**peaks, "stored": round(stored / 1e6)}
