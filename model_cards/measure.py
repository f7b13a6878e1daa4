"""Measure ONNX files: bytes, losses, milliseconds of an image in onnxruntime and in Chromium.

python model_cards/measure.py --teacher facebook/dinov2-small --models raptor_k3=outputs/raptor_k3
        --dataset data/photos --split val --output_dir outputs/mine/files

Files that are missing or out of date are exported first; those of the teacher are of a Raptor with
a block for each layer, which is the teacher. All times are on one thread, and interleaved. Needs
the extra `onnx`; in the browser also npm install in evaluation/demo, playwright and Chromium.
"""

import functools
import importlib.util
import logging
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from evaluation.benchmarks.timing import interleaved
from model_cards import export, publish
from raptor_hf import make_raptor
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import read_json, write_json
from raptor_hf.runs.folder import environment
from raptor_hf.runs.processes import run_program
from raptor_hf.teachers import load_backbone, load_processor

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ROUNDS = 3  # each times every file twice in onnxruntime, and once in the browser
LONGEST = 300_000  # milliseconds that an image may take in the browser


@dataclass(kw_only=True)
class Arguments:
    """Models to measure, and the images to compare them on."""

    teacher: str = field(metadata={"help": "Hub id or folder of the teacher"})
    models: list[str] = field(metadata={"help": "Raptors of it: folders or NAME=FOLDER"})
    output_dir: str = field(metadata={"help": "folder for onnx.json"})
    dataset: str = field(default="digits", metadata={"help": "as of export.py"})
    split: str = field(default="test", metadata={"help": "of the dataset"})


def can_browse() -> bool:
    """Return whether the page can be opened: transformers.js, playwright and Chromium are there."""
    runs = all((publish.PAGE / name).is_file() for name in publish.PAGE_FILES)
    return bool(runs and shutil.which("chromium") and importlib.util.find_spec("playwright"))


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *args) -> None:
        """Print nothing."""


@contextmanager
def chromium(folder: Path) -> Iterator[tuple]:
    """Serve a folder; yield a page of a headless Chromium, its address, and the list of all URLs
    that the page asks for.
    """
    from playwright.sync_api import sync_playwright

    handler = functools.partial(_Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url.removeprefix("blob:")))
        yield page, f"http://127.0.0.1:{server.server_port}/", asked
        browser.close()
        server.shutdown()


def show_sample(page, address: str) -> float:
    """Open the page at an address; return the milliseconds of its second run of the sample."""
    page.goto(address)
    for first in (True, False):
        page.wait_for_selector("body[data-milliseconds]", timeout=LONGEST)
        if first:
            page.click("#sample")
    return float(page.get_attribute("body", "data-milliseconds"))


def export_all(folder: Path, dataset: list[str]) -> dict:
    """Export a model and its states in all precisions; return `export.json`."""
    for more in ([], ["--states"]):
        export.main(["--model", str(folder), *dataset, *more])
    return read_json(folder / "export.json")


def run_once(file: Path, size: list[int]):
    """Return a function that runs a file on one image of noise, on one thread."""
    session = export.open_session(file, threads=1)
    image = np.random.default_rng(0).normal(size=(1, 3, *size)).astype(np.float32)
    return lambda: session.run(None, {"pixel_values": image})


def measure(models: dict[str, Path], accounts: dict[str, dict]) -> dict:
    """Return what export.json says of all files and their milliseconds, by model and precision."""
    found, candidates = {name: {} for name in models}, {}
    for name, folder in models.items():
        for dtype, suffix in export.SUFFIXES.items():
            file = f"onnx/model{suffix}.onnx"
            found[name][dtype] = dict(accounts[name]["files"][file])
            candidates[name, dtype] = run_once(folder / file, accounts[name]["size"])
    clock = time.process_time  # other load on the machine does not count
    for (name, dtype), times in interleaved(candidates, rounds=ROUNDS, clock=clock).items():
        found[name][dtype]["milliseconds"] = round(1000 * statistics.median(times), 1)
    return found


def measure_in_browser(models: dict[str, Path]) -> dict[tuple[str, str], float]:
    """Return the milliseconds of an image in Chromium, by model and precision, and print what the
    page says.
    """
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as site:
        publish.make_site(Path(site), models)
        with chromium(Path(site)) as (page, address, _):
            for _ in range(ROUNDS):
                for dtype in export.SUFFIXES:
                    for name in models:
                        value = show_sample(page, f"{address}?model={name}&dtype={dtype}")
                        times.setdefault((name, dtype), []).append(value)
                        print(name, page.inner_text("#facts"), f"{value:.0f} ms", flush=True)
    return {key: round(statistics.median(values), 1) for key, values in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Export, compare, time, write."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    models = named_folders("--models", arguments.models, reserved=["teacher"])
    dataset = ["--dataset", arguments.dataset, "--split", arguments.split]
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        # the teacher as a Raptor
        teacher = load_backbone(arguments.teacher)
        phases = [1] * teacher.config.num_hidden_layers
        copied = make_raptor(teacher, phases, init="teacher", depth_scaling=False)
        copied.save_pretrained(folder)
        load_processor(arguments.teacher).save_pretrained(folder)
        models = {name: Path(path) for name, path in {"teacher": folder, **models}.items()}

        # files, and their times
        accounts = {name: export_all(path, dataset) for name, path in models.items()}
        found = measure(models, accounts)
        if can_browse():
            for (name, dtype), value in measure_in_browser(models).items():
                found[name][dtype]["milliseconds_in_chromium"] = value

    facts = {key: accounts["teacher"][key] for key in ("dataset", "split", "num_images", "size")}
    content = {"settings": facts, "environment": environment(), "files": found}
    write_json(output / "onnx.json", content)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # as in export.py
    run_program(main, alone=True)
