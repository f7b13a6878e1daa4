"""Reading stored states, and reading images, beside other ways to get the same batches."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.activations.store import StoredActivations, load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.transforms import Augmentation

from .models import SIZES
from .timing import Row, interleaved, median_ratio

_BATCH = 64
_PIXELS = 224
_PHOTOGRAPHS = {"500×375": (500, 375), "2000×1500": (2000, 1500)}


def extract(size: str, number: int, path: Path) -> None:
    """Write the states of some digits and of a random teacher with a narrow FFN."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SIZES[size], num_register_tokens=4, mlp_ratio=1)
    path.mkdir(parents=True)
    digits = load_images("digits", "train").select(range(number))
    images = ImageViews(digits, make_processor(config.image_size))
    write_activations(Dinov2WithRegistersModel(config).eval(), images, path)


def benchmark_activations(size: str, number: int, rounds: int, folder: Path) -> Iterator[Row]:
    """Yield how many times longer other stores take for random batches of the same states.

    *np.memmap* is a flat file of the same bytes, *torch format* is `datasets`' own, and *reference*
    is the research code's zarr store (zstd-3 and shuffle, chunks of 128 images and one layer,
    float32) with its batches of 64 images that lie together. `folder` must not exist.
    """
    try:
        extract(size, number, folder / "store")
        activations = load_activations(folder / "store")
        _write_others(activations, folder)
        yield "reading, all layers", _compare_stores(folder, activations.layers, rounds)
        yield "reading, 4 layers", _compare_stores(folder, activations.layers[7:11], rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_others(activations: StoredActivations, folder: Path) -> None:
    """Write the same states as one flat file, and in the reference's layout."""
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


def _compare_stores(folder: Path, layers: list[int], rounds: int) -> dict[str, float]:
    """Return the time of every other store over that of ours, for some consecutive layers."""
    import zarr

    # the five stores; the reference has to deliver float32
    store, part = folder / "store", slice(layers[0], layers[-1] + 1)
    ours = load_activations(store, layers=layers)
    number, all_layers = len(ours), len(load_activations(store).layers)
    flat = np.memmap(folder / "flat.bin", dtype=np.float16, mode="r")
    flat = flat.reshape(number, all_layers, *ours[0]["states"].shape[1:])
    columns = [f"layer_{layer}" for layer in layers]
    stock = datasets.load_from_disk(str(store)).select_columns(columns).with_format("torch")
    reference = zarr.open(str(folder / "reference.zarr"), mode="r")

    def rows(visit: int) -> np.ndarray:
        return np.random.default_rng(visit).permutation(number)[:_BATCH]

    def slab(visit: int) -> slice:
        start = _BATCH * (visit % (number // _BATCH))
        return slice(start, start + _BATCH)

    candidates = {
        "ours": lambda visit: ours.__getitems__(rows(visit)),
        "ours again": lambda visit: ours.__getitems__(rows(visit)),
        "np.memmap": lambda visit: torch.from_numpy(flat[rows(visit), part]),
        "torch format": lambda visit: stock[rows(visit)],
        "ours, float32": lambda visit: ours.__getitems__(rows(visit))["states"].float(),
        "reference": lambda visit: torch.from_numpy(reference[slab(visit), part]),
    }
    # all must deliver the same numbers
    states = candidates["ours"](0)["states"]
    assert torch.equal(states, candidates["np.memmap"](0))
    assert torch.equal(candidates["torch format"](0)[columns[-1]], states[:, -1].float())
    together = ours.__getitems__(range(_BATCH))["states"]
    assert torch.equal(together.float(), candidates["reference"](0))

    times = interleaved(candidates, rounds=rounds)
    return {
        "np.memmap": median_ratio(times, "np.memmap", "ours"),
        "torch format": median_ratio(times, "torch format", "ours"),
        "reference": median_ratio(times, "reference", "ours, float32"),
        "ours again": median_ratio(times, "ours again", "ours"),
        "images_per_second": _BATCH / float(np.median(times["ours"])),
    }


def write_photographs(folder: Path, number: int, size: tuple[int, int]) -> Path:
    """Write JPEG files of parts of scikit-learn's two photographs, in the split `train`."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    (folder / "train").mkdir(parents=True)
    for index in range(number):
        image, rng = photographs[index % 2], np.random.default_rng(index)
        scale = rng.uniform(0.6, 1.0)
        width, height = (round(scale * length) for length in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        part = image.resize(size, box=(left, top, left + width, top + height))
        part.save(folder / "train" / f"{index:05d}.jpg", quality=90)
    return folder


def benchmark_images(number: int, rounds: int, folder: Path) -> Iterator[Row]:
    """Yield images a second and core from files to a batch of random crops, flipped.

    *plain* is Pillow's decoder and resizing and the model's own image processor, as most programs
    have it. The files lie in the memory of the system. `folder` must not exist.

    Args:
        number: of files of each size.
    """
    try:
        for name, size in _PHOTOGRAPHS.items():
            path = write_photographs(folder / name, number, size)
            yield from _compare_readers(f"JPEG of {name}", path, folder / "cache", rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare_readers(title: str, path: Path, cache: Path, rounds: int) -> Iterator[Row]:
    """Yield the speed of each way to read one folder of photographs."""
    processor = make_processor(_PIXELS)
    crops = Augmentation.of(CropArguments(), (_PIXELS, _PIXELS))
    short = {"shorter_side": -(-_PIXELS * 8 // 7)}
    files = sorted((path / "train").iterdir())

    def ours(**options) -> Callable[[int], object]:
        reading = ReadingArguments(**options)
        views = ImageViews(
            load_images(str(path), "train", reading), processor, crops=crops, reading=reading,
            views=10**6, plain_first=False, as_bytes=True,
        )  # fmt: skip
        return lambda visit: views.__getitems__(range((visit + 2) * _BATCH, (visit + 3) * _BATCH))

    def plain(visit: int) -> torch.Tensor:
        images = []
        for row in range(_BATCH):
            rng = np.random.default_rng((visit + 2, row))
            image = Image.open(files[((visit + 2) * _BATCH + row) % len(files)]).convert("RGB")
            left, top, width, height = crops.draw_box(*image.size, rng)
            box = (left, top, left + width, top + height)
            images.append(image.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC, box=box))
        prepared = processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
        return prepared["pixel_values"]

    ways = {
        "plain": plain,
        "ours": ours(),
        "ours again": ours(),
        "ours, --shorter_side": ours(**short),
        "ours, --image_cache": ours(**short, image_cache=str(cache)),
    }
    times = interleaved(ways, rounds=rounds, clock=time.process_time)
    speeds = {name: _BATCH / float(np.median(seconds)) for name, seconds in times.items()}
    yield f"{title}: images a second", speeds
    others = [name for name in ways if name != "plain"]
    yield f"reading, {title}", {name: median_ratio(times, "plain", name) for name in others}
