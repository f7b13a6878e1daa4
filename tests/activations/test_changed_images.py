"""A store is of the images that it was begun with, and unreadable ones are left out on request."""

import sys

import numpy as np
import pytest
from PIL import Image

from raptor_hf.activations.format import verify_activations
from raptor_hf.activations.store import load_activations
from raptor_hf.data import list_images, load_images, make_processor
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


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_other_images(roll, change):
    before = list_images(str(roll), load_images(str(roll), "train"))
    assert list_images(str(roll), load_images(str(roll), "train")).digest == before.digest
    CHANGES[change](roll / "train")
    assert list_images(str(roll), load_images(str(roll), "train")).digest != before.digest


def test_other_images_are_refused(roll):
    stopped, store = extract(roll, "store", check=False)
    assert stopped.returncode and "a/05.png can't be decoded" in stopped.stderr
    photo(roll / "train" / "a" / "05.png", 85)
    for more in (["--resume"], []):
        refused, _ = extract(roll, "store", *more, check=False)
        assert refused.returncode and "other images" in refused.stderr
    assert not (store / "manifest.json").exists()


@pytest.mark.parametrize("start", [(sys.executable,), TWO_PROCESSES], ids=["one", "two"])
def test_unreadable_images_are_left_out_and_listed(roll, start):
    """It goes on where it stopped, though a whole shard has nothing but unreadable images."""
    (roll / "train" / "a" / "04.png").write_bytes(b"no image")
    extract(roll, "store", start=start, check=False)
    again, store = extract(
        roll, "store", "--resume", "--skip_corrupt", "2", "--num_workers", "2", start=start
    )
    assert "left out: " in again.stderr
    manifest = read_json(store / "manifest.json")
    assert [entry["image_id"] for entry in manifest["skipped_images"]] == [4, 5]
    assert manifest["skipped_images"][1]["path"].endswith("a/05.png")
    assert manifest["num_images"] == 14 and not verify_activations(store)
    kept = [n for n in range(16) if n not in (4, 5)]
    assert load_activations(store).scalars["image_id"].tolist() == kept
    (roll / "train" / "a" / "04.png").unlink()
    (roll / "train" / "a" / "05.png").unlink()
    _, fresh = extract(roll, "fresh")
    assert np.allclose(states(store), states(fresh), atol=1e-3)
    assert "finished already" in extract(roll, "fresh")[0].stdout


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
