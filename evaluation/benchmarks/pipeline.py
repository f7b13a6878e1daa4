"""From image files to batches, on one core, and from files to an update, end to end."""
# `benchmark_train` is over 40 lines: three ways to the same steps, and what follows from them.

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf import make_raptor
from raptor_hf.activations.online import OnlineActivations
from raptor_hf.data import ImageViews, ReadingArguments, keep_batch, load_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.data.decoding import open_image, to_pixel_values
from raptor_hf.data.transforms import Augmentation
from raptor_hf.distillation.arguments import ObjectiveArguments
from raptor_hf.distillation.blocks import chain_of
from raptor_hf.distillation.compute import application_flops
from raptor_hf.distillation.matching import TrajectoryMatching, matching_loss
from raptor_hf.loop import fit, read_log
from raptor_hf.loop.arguments import LoopArguments

from .models import PHASES
from .settings import TEACHERS
from .speed import Measurement
from .timing import interleaved, matmul_peak, median_ratio, within

_BATCH = 64
_REPLAYED = "on the device, CUDA graphs"
_SIZES = {"500×375": (500, 375), "2000×1500": (2000, 1500)}


def write_photographs(folder: Path, number: int, size: tuple[int, int] = (500, 375)) -> Path:
    """Write JPEG files of parts of scikit-learn's two photographs, in the split `train`."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for index in range(number):
        image, rng = photographs[index % 2], np.random.default_rng(index)
        scale = rng.uniform(0.6, 1.0)
        width, height = (round(scale * length) for length in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        part = image.resize(size, box=(left, top, left + width, top + height))
        part.save(folder / "train" / f"{index:05d}.jpg", quality=90)
    return folder


def benchmark_images(
    number: int, rounds: int, folder: Path, resolution: int = 224
) -> Iterator[Measurement]:
    """Yield images a second and core, ready for a step: random crops, flipped, normalised or as
    bytes.

    *plain* is Pillow's decoder and resizing and the model's own image processor, as most programs
    have it; the others are ours. Every way makes random views of the same files, which lie in the
    memory of the system.

    Args:
        number: of files of each size.
        folder: emptied afterwards.
        resolution: of the batches, in pixels.
    """
    torch.set_num_threads(1)
    try:
        for name, size in _SIZES.items():
            path = str(write_photographs(folder / name, number, size))
            yield from _compare_readers(f"JPEG of {name}", path, folder, rounds, resolution)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare_readers(
    title: str, path: str, folder: Path, rounds: int, resolution: int
) -> Iterator[Measurement]:
    """Yield the speeds of the ways to read one folder of images."""
    processor = make_processor(resolution)
    crops = Augmentation.of(CropArguments(), (resolution, resolution))
    short = {"shorter_side": -(-resolution * 8 // 7)}

    def ours(**reading) -> Callable[[int], object]:
        given = ReadingArguments(**reading)
        dataset = load_images(path, "train", given)
        options = {"views": 10**6, "plain_first": False, "as_bytes": True, "reading": given}
        views = ImageViews(dataset, processor, crops=crops, **options)
        return lambda visit: views.__getitems__(range((visit + 2) * _BATCH, (visit + 3) * _BATCH))

    files = ImageViews(load_images(path, "train"), processor).cells["image"]
    paths = [file["path"] for file in files]

    def plain(visit: int) -> torch.Tensor:
        images = []
        for row in range(_BATCH):
            rng = np.random.default_rng((visit + 2, row))
            file = paths[((visit + 2) * _BATCH + row) % len(paths)]
            image = open_image(file, name=file, rgb=True, max_megapixels=89.0)
            left, top, width, height = crops.draw_box(*image.size, rng)
            box = (left, top, left + width, top + height)
            images.append(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))
        return to_pixel_values(images, processor, do_resize=False, do_center_crop=False)

    ways = {
        "plain": plain,
        "ours": ours(),
        "ours again": ours(),
        "ours, --shorter_side": ours(**short),
        "ours, --image_cache": ours(**short, image_cache=str(folder / "cache")),
    }
    times = interleaved(ways, rounds=rounds, clock=time.process_time)
    yield (
        f"{title}: images a second",
        {name: _BATCH / float(np.median(seconds)) for name, seconds in times.items()},
    )
    yield (
        f"reading, {title}",
        {name: median_ratio(times, "plain", name) for name in ways if name != "plain"},
    )


def benchmark_train(
    size: str,
    batch: int,
    steps: int,
    device: str,
    dtype: torch.dtype,
    folder: Path,
    *,
    images: str | None = None,
    workers: int = 0,
    compiled: bool = False,
    graphs: bool = False,
    limit: float = 600.0,
) -> Iterator[Measurement]:
    """Yield images a second of online distillation: of a batch that lies on the device, from files,
    and from the image cache; with the share of the time that the device waited.

    Args:
        size: of a DINOv2 with random weights, one of `TEACHERS`.
        steps: of each, once everything is compiled.
        folder: for what is written.
        images: folder of photographs with a split `train`; default: made ones of 500×375 pixels.
        workers: processes that read images.
        compiled: blocks, teacher and loss.
        graphs: replay steps as CUDA graphs; on the device also without.
        limit: seconds that each may take; else it is left out.
    """
    # what `accelerate launch` says with --mixed_precision and --dynamo_backend
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == torch.bfloat16 else "no"
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "inductor" if compiled else "no"
    folder.mkdir(parents=True, exist_ok=True)
    images = images or str(write_photographs(folder / "photographs", 512))
    shape = TEACHERS[size]
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**shape, num_register_tokens=4, num_hidden_layers=12)
    teacher = Dinov2WithRegistersModel(config).eval().requires_grad_(False).to(device)
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"

    def source(reading: ReadingArguments) -> OnlineActivations:
        side = shape["image_size"]
        crops = Augmentation.of(CropArguments(), (side, side))
        options = {"views": 64, "plain_first": False, "crops": crops, "as_bytes": True}
        views = ImageViews(
            load_images(images, "train", reading), make_processor(side), reading=reading, **options
        )
        return OnlineActivations(teacher, views, precision=precision)

    cache = ReadingArguments(
        shorter_side=math.ceil(8 / 7 * shape["image_size"]), image_cache=str(folder / "cache")
    )
    resident = partial(_resident_speed, teacher, source(ReadingArguments()))
    ways = {
        "on the device": resident,
        **({_REPLAYED: resident} if graphs else {}),
        "from files": lambda run: _fitted_speed(teacher, source(ReadingArguments()), run),
        "from the cache": lambda run: _fitted_speed(teacher, source(cache), run),
    }
    settings = {"batch_size": batch, "num_workers": workers, "steps": steps}
    peak, found = matmul_peak(device, dtype, 5), {}
    for number, (way, measure) in enumerate(ways.items()):
        run = LoopArguments(
            output_dir=str(folder / f"run_{number}"), optimizer="muon", learning_rate=1e-4,
            report_to="none", warmup_steps=0, log_every=max(1, steps // 3), checkpoint_every=0,
            cuda_graphs=graphs and way != "on the device", **settings,
        )  # fmt: skip
        title = f"training {way}"
        for name, row in within(limit, title, partial(_one_row, title, measure, run)):
            found[way] = row.get("images a second")
            yield name, row
    plain = found.pop("on the device")
    if best := found.pop(_REPLAYED, plain):
        tokens = 5 + (shape["image_size"] // shape["patch_size"]) ** 2
        one = 12 * application_flops(make_raptor(teacher, PHASES).config, tokens)
        yield "training: share of the peak", {"on the device": 4 * one * best / peak}
        shares = {way: speed / best for way, speed in found.items() if speed}
        yield "training: of the speed on the device", shares
        waited = {way: max(0.0, 1 - share) for way, share in shares.items()}
        yield "training: share of the time that the device waited", waited


def _one_row(title: str, measure: Callable, run: LoopArguments) -> Iterator[Measurement]:
    """Yield what is measured."""
    yield title, {"images a second": measure(run)}


def _matching(teacher: nn.Module, activations: OnlineActivations) -> TrajectoryMatching:
    """Return the blocks of a Raptor of k = 3 that learn as by default."""
    raptor = make_raptor(teacher, PHASES, init="teacher")
    objective = ObjectiveArguments(objective="autoregressive")
    return TrajectoryMatching([chain_of(raptor, None)], objective, activations.layout.groups())


class _OneBatch(Dataset):
    """A dataset that returns the same batch in every step, and so takes no time to read."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["pixel_values"])

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return dict(self.batch)


def _resident_speed(
    teacher: nn.Module, activations: OnlineActivations, run: LoopArguments
) -> float:
    """Return images a second of a training that need not read its images."""
    batch = keep_batch(activations.__getitems__(range(run.batch_size)))
    return _fitted_speed(teacher, activations, replace(run, num_workers=0), _OneBatch(batch))


def _fitted_speed(
    teacher: nn.Module,
    activations: OnlineActivations,
    run: LoopArguments,
    dataset: Dataset | None = None,
) -> float:
    """Return images a second of a training, without its first third."""
    module = _matching(teacher, activations)
    fit(module, dataset or activations, matching_loss(activations), run, kind=module.kind)
    speeds_logged = [line["images_per_second"] for line in read_log(run.output_dir)]
    later = speeds_logged[1:] or speeds_logged
    return len(later) / sum(1 / speed for speed in later)
