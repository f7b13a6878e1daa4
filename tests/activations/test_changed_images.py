"""A store is of the images that it was begun with; others replace unreadable ones on request."""

import sys

import pytest
from PIL import Image

from raptor_hf.activations.store import load_activations
from raptor_hf.data import list_images, load_images, make_processor
from raptor_hf.loop.log import read_log
from tests.helpers import assert_same_outputs, tiny_teacher
from tests.programs import run


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


def extract(roll, name, *more, check=True):
    """Extraction in small shards: what it printed and its folder."""
    folder = roll.parent / name
    command = ["training/extract_activations.py", "--teacher", roll.parent / "teacher"]
    command += ["--dataset", roll, "--batch_size", "2", "--shard_megabytes", "0"]
    done = run(sys.executable, *command, "--output_dir", folder, *more, check=check)
    return done, folder


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
        assert refused.returncode and "images: made with" in refused.stderr
    assert not (store / "manifest.json").exists()


def test_other_images_take_the_place_of_unreadable_ones(roll):
    """Where it stopped it goes on."""
    (roll / "train" / "a" / "04.png").write_bytes(b"no image")
    extract(roll, "store", check=False)
    again, store = extract(roll, "store", "--resume", "--skip_corrupt", "--num_workers", "2")
    assert "a/05.png can't be decoded" in again.stderr
    stored = load_activations(store)
    image_ids = stored.scalars["image_id"].tolist()
    assert image_ids == [0, 1, 2, 3, 6, 6, 6, *range(7, 16)]
    assert_same_outputs(stored[4]["states"], stored[6]["states"], 1e-3)
    assert "finished already" in extract(roll, "store", "--skip_corrupt")[0].stdout


def test_online_training_goes_on_without_them(roll):
    command = ["training/distill_raptor.py", "--teacher", roll.parent / "teacher"]
    command += ["--activations", "online", "--dataset", roll, "--phases", "3", "3", "--steps", "8"]
    command += ["--batch_size", "4", "--warmup_steps", "1", "--report_to", "none"]
    command += ["--views", "0", "--checkpoint_every", "1", "--output_dir", roll.parent / "raptor"]
    stopped = run(sys.executable, *command, check=False)
    assert "a/05.png can't be decoded" in stopped.stderr
    run(sys.executable, *command, "--skip_corrupt", "--resume")
    assert read_log(roll.parent / "raptor")[-1]["step"] == 8
