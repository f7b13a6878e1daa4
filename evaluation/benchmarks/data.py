"""Reading stored states, and reading images, beside other ways to get the same batches."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import zarr
from numcodecs import Blosc
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor
from raptor_hf.data.transforms import Augmentation

from .models import SIZES
from .timing import Row, interleaved, median_ratio

_BATCH = 64
_PIXELS = 224
_PHOTOGRAPHS = {"500×375": (500, 375), "2000×1500": (2000, 1500)}


def benchmark_activations(size: str, number: int, rounds: int, folder: Path) -> Iterator[Row]:
    """Yield how many times longer other stores take for random batches of the same states.

    *np.memmap* is a flat file of the same bytes, *torch format* is `datasets`' own, and *reference*
    is the research code's zarr store (zstd-3 and shuffle, chunks of 128 images and one layer,
    float32) with its batches of 64 images that lie together.
    """
    # a teacher with a narrow FFN, which makes extraction quick
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SIZES[size], num_register_tokens=4, mlp_ratio=1)
    digits = load_images("digits", "train").select(range(number))
    images = ImageViews(digits, make_processor(config.image_size))
    store = folder / "store"
    store.mkdir(parents=True)
    write_activations(Dinov2WithRegistersModel(config).eval(), images, store)

    # the same states in the other stores
    states = load_activations(store).__getitems__(range(number))["states"]
    (folder / "flat.bin").write_bytes(states.numpy().tobytes())
    compressor = Blosc(cname="zstd", clevel=3, shuffle=Blosc.SHUFFLE)
    reference = zarr.open(
        str(folder / "reference.zarr"), mode="w", shape=states.shape, dtype="f4",
        chunks=(128, 1, *states.shape[2:]), compressor=compressor,
    )  # fmt: skip
    reference[:] = states.float().numpy()
    for name, layers in {"all layers": range(13), "4 layers": range(7, 11)}.items():
        yield f"reading, {name}", _compare_stores(folder, layers, tuple(states.shape), rounds)


def _compare_stores(
    folder: Path, layers: range, shape: tuple[int, ...], rounds: int
) -> dict[str, float]:
    """Return the time of every other store over that of ours, for some consecutive layers."""
    # the same states in four layouts
    number, part = shape[0], slice(layers[0], layers[-1] + 1)
    ours = load_activations(folder / "store", layers=layers)
    flat = np.memmap(folder / "flat.bin", dtype=np.float16, mode="r", shape=shape)
    stock = datasets.load_from_disk(str(folder / "store")).with_format("torch")
    stock = stock.select_columns([f"layer_{layer}" for layer in layers])
    reference = zarr.open(str(folder / "reference.zarr"), mode="r")

    def rows(visit: int) -> np.ndarray:
        return np.random.default_rng(visit).permutation(number)[:_BATCH]

    def together(visit: int) -> slice:
        start = _BATCH * (visit % (number // _BATCH))
        return slice(start, start + _BATCH)

    # random rows of each; the reference's code reads consecutive ones, as float32
    candidates = {
        "ours": lambda visit: ours.__getitems__(rows(visit))["states"],
        "ours again": lambda visit: ours.__getitems__(rows(visit))["states"],
        "np.memmap": lambda visit: torch.from_numpy(flat[rows(visit), part]),
        "torch format": lambda visit: stock[rows(visit)],
        "ours, float32": lambda visit: ours.__getitems__(rows(visit))["states"].float(),
        "reference": lambda visit: torch.from_numpy(reference[together(visit), part]),
    }
    assert torch.equal(candidates["ours"](0), candidates["np.memmap"](0))
    times = interleaved(candidates, rounds=rounds)
    row = {name: median_ratio(times, name, "ours") for name in list(candidates)[1:4]}
    row["reference"] = median_ratio(times, "reference", "ours, float32")
    row["images_per_second"] = _BATCH / float(np.median(times["ours"]))
    return row


def benchmark_images(number: int, rounds: int, folder: Path) -> Iterator[Row]:
    """Yield images a second and core from JPEG files to a batch of random crops, flipped.

    *plain* is Pillow's decoder and resizing and the model's own image processor, as most programs
    have it. The files lie in the memory of the system.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for name, size in _PHOTOGRAPHS.items():
        (folder / name / "train").mkdir(parents=True)
        for index in range(number):
            photograph = photographs[index % 2].resize(size)
            photograph.save(folder / name / "train" / f"{index:05d}.jpg", quality=90)
        times = _compare_readers(folder / name, folder / "cache", rounds)
        speeds = {way: _BATCH / float(np.median(seconds)) for way, seconds in times.items()}
        yield f"JPEG of {name}: images a second", speeds
        ratios = {way: median_ratio(times, "plain", way) for way in times if way != "plain"}
        yield f"reading, JPEG of {name}", ratios


def _compare_readers(path: Path, cache: Path, rounds: int) -> dict[str, list[float]]:
    """Return the times of the ways to read batches of one folder of photographs."""
    # our reader, with its options
    processor, crops = make_processor(_PIXELS), Augmentation(size=(_PIXELS, _PIXELS))
    files = sorted((path / "train").iterdir())

    def ours(**options) -> Callable[[int], object]:
        reading = ReadingArguments(**options)
        views = ImageViews(
            load_images(str(path), "train", reading), processor, crops=crops, reading=reading,
            views=10**6, plain_first=False, as_bytes=True,
        )  # fmt: skip
        return lambda visit: views.__getitems__(range((visit + 2) * _BATCH, (visit + 3) * _BATCH))

    # Pillow and the image processor, with the same crops
    def plain(visit: int) -> torch.Tensor:
        images = []
        for row in range(_BATCH):
            image = Image.open(files[row % len(files)]).convert("RGB")
            rng = np.random.default_rng((visit + 2, row))
            left, top, width, height = crops.draw_box(*image.size, rng)
            box = (left, top, left + width, top + height)
            images.append(image.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC, box=box))
        prepared = processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
        return prepared["pixel_values"]

    # CPU seconds of each
    short = {"shorter_side": -(-_PIXELS * 8 // 7)}
    ways = {
        "plain": plain,
        "ours": ours(),
        "ours again": ours(),
        "ours, --shorter_side": ours(**short),
        "ours, --image_cache": ours(**short, image_cache=str(cache)),
    }
    return interleaved(ways, rounds=rounds, clock=time.process_time)
