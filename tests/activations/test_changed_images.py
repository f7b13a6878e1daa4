"""A store is of the images that it was begun with, and unreadable ones are left out on request."""

import sys

import numpy as np
import pytest
from PIL import Image

from raptor_hf.activations.format import verify_activations
from raptor_hf.activations.store import load_activations
from raptor_hf.data import make_processor
from raptor_hf.loop.log import read_log
from raptor_hf.runs.files import read_json
from tests.helpers import tiny_teacher
from tests.programs import TWO_PROCESSES, run


def photo(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (12, 12), grey).save(path)


@pytest.fixture
def roll(tmp_path):
    """Sixteen photos, of which one can't be read, and a teacher."""
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    for n in range(16):
        photo(tmp_path / "roll" / "train" / ("a" if n < 8 else "b") / f"{n:02d}.png", 10 + 15 * n)
    (tmp_path / "roll" / "train" / "a" / "05.png").write_bytes(b"")
    return tmp_path / "roll"


def extract(roll, name, *more, start=(sys.executable,), check=True):
    """Extraction in small shards: what it printed and its folder."""
    folder = roll.parent / name
    command = [*start, "training/extract_activations.py", "--teacher", roll.parent / "teacher"]
    command += ["--dataset", roll, "--batch_size", "2", "--shard_megabytes", "0"]
    done = run(*command, "--output_dir", folder, *more, check=check, ACCELERATE_USE_CPU="true")
    return done, folder


def states(folder):
    stored = load_activations(folder)
    return stored.__getitems__(range(len(stored)))["states"].numpy()


CHANGES = {
    "deleted": lambda folder: (folder / "a" / "05.png").unlink(),
    "added": lambda folder: photo(folder / "a" / "00b.png", 7),
    "renamed": lambda folder: (folder / "a" / "02.png").rename(folder / "b" / "02.png"),
    "replaced": lambda folder: photo(folder / "a" / "05.png", 85),
}
NAMED = {
    "deleted": "a/05.png is gone (16 files before, 15 now)",
    "added": "a/00b.png is new (16 files before, 17 now)",
    "renamed": "a/02.png is gone (16 files before, 16 now)",
    "replaced": "a/05.png changed (16 files before, 16 now)",
}


@pytest.mark.parametrize("start", [(sys.executable,), TWO_PROCESSES], ids=["one", "two"])
@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_refused(roll, change, start):
    stopped, store = extract(roll, "store", start=start, check=False)
    assert stopped.returncode and "a/05.png can't be decoded" in stopped.stderr
    CHANGES[change](roll / "train")
    refused, _ = extract(roll, "store", "--resume", start=start, check=False)
    assert refused.returncode and NAMED[change] in refused.stderr
    assert not (store / "manifest.json").exists()


def test_a_finished_store_of_other_images_is_refused(roll):
    photo(roll / "train" / "a" / "05.png", 85)
    extract(roll, "store")
    assert "finished already" in extract(roll, "store")[0].stdout
    photo(roll / "train" / "a" / "07.png", 116)
    refused, _ = extract(roll, "store", check=False)
    assert refused.returncode and "a/07.png changed" in refused.stderr


@pytest.mark.parametrize("start", [(sys.executable,), TWO_PROCESSES], ids=["one", "two"])
def test_unreadable_images_are_left_out_and_listed(roll, start):
    """It goes on where it stopped, with what it was asked to tolerate."""
    extract(roll, "store", start=start, check=False)
    again, store = extract(roll, "store", "--resume", "--skip_corrupt", "1", start=start)
    assert "left out: " in again.stderr
    manifest = read_json(store / "manifest.json")
    (skipped,) = manifest["skipped_images"]
    assert skipped["image_id"] == 5 and skipped["path"].endswith("a/05.png")
    assert manifest["num_images"] == 15 and not verify_activations(store)
    assert load_activations(store).scalars["image_id"].tolist() == [n for n in range(16) if n != 5]
    (roll / "train" / "a" / "05.png").unlink()
    _, fresh = extract(roll, "fresh")
    assert np.allclose(states(store), states(fresh), atol=1e-3)


def test_a_shard_of_nothing_but_unreadable_images(roll):
    (roll / "train" / "a" / "04.png").write_bytes(b"no image")
    _, store = extract(roll, "store", "--skip_corrupt", "2", "--num_workers", "2")
    assert not verify_activations(store)
    assert len(load_activations(store)) == 14
    refused, _ = extract(roll, "other", "--skip_corrupt", "1", check=False)
    assert "unreadable images so far: 2 of 16; --skip_corrupt 1 may be left out" in refused.stderr


def test_online_training_leaves_them_out_and_lists_them(roll):
    command = ["training/distill_raptor.py", "--teacher", roll.parent / "teacher"]
    command += ["--activations", "online", "--dataset", roll, "--phases", "3", "3", "--steps", "8"]
    command += ["--batch_size", "4", "--warmup_steps", "1", "--report_to", "none"]
    command += ["--views", "0"]
    stopped = run(sys.executable, *command, "--output_dir", roll.parent / "stopped", check=False)
    assert "a/05.png can't be decoded" in stopped.stderr
    folder = roll.parent / "raptor"
    run(sys.executable, *command, "--output_dir", folder, "--skip_corrupt", "3")
    (skipped,) = read_json(folder / "skipped_images.json")["images"]
    assert skipped["image_id"] == 5 and skipped["path"].endswith("a/05.png")
    assert read_log(folder)[-1]["step"] == 8
    (roll / "train" / "b" / "08.png").unlink()
    refused = run(
        sys.executable, *command, "--output_dir", folder, "--skip_corrupt", "3", check=False
    )
    assert "b/08.png is gone" in refused.stderr
