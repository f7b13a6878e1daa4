"""Writing activations: subsets, kills, several processes, full disks."""

import errno
import random
import shutil
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from filelock import FileLock

from raptor_hf.activations import writing
from raptor_hf.activations.format import shard_facts, verify_activations
from raptor_hf.activations.store import load_activations
from raptor_hf.activations.writing import write_activations
from raptor_hf.data import make_processor
from raptor_hf.runs.files import read_json
from raptor_hf.teachers import trajectory
from tests.helpers import PROCESSES, grey_images, tiny_teacher
from tests.programs import TWO_PROCESSES, run


def checksums(path):
    return {
        name: facts["xxh3_128"]
        for name, facts in read_json(path / "manifest.json")["shards"].items()
    }


def test_a_resumed_store_has_the_same_bytes(store, teacher, images, tmp_path):
    shards = sorted(store.glob("data-*.arrow"))
    assert len(shards) == 5
    before = {shard.name: shard.read_bytes() for shard in shards}
    shards[1].unlink()
    shards[2].write_bytes(bytes(len(before[shards[2].name])))  # zeros, as of another writer
    shards[4].unlink()
    (store / "data-00001-of-00005.123.tmp").write_bytes(b"half")
    write_activations(teacher, images, store, batch_size=2, shard_megabytes=0)
    assert {shard.name: shard.read_bytes() for shard in store.glob("data-*.arrow")} == before
    assert not list(store.glob("*.tmp"))


def test_values_beyond_float16_are_an_error_with_layer_and_image(teacher, images, tmp_path):
    with torch.no_grad():
        teacher.encoder.layer[2].layer_scale2.lambda1.fill_(1e8)
    with pytest.raises(
        ValueError, match="after layer 3 of image 0 holds NaN, or values that float16 can't"
    ):
        write_activations(teacher, images, tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


def test_a_folder_has_one_writer(teacher, images, tmp_path):
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="is being written by"):
            write_activations(teacher, images, tmp_path)
    write_activations(teacher, images, tmp_path)  # it is free again


def test_a_full_disk_is_noticed_before_writing(teacher, images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 kB are free. Store less"):
        write_activations(teacher, images, tmp_path)
    assert not list(tmp_path.glob("data-*"))


def test_some_layers_of_some_images(teacher, images, tmp_path):
    images.image_ids = np.array([1, 4])
    write_activations(teacher, images, tmp_path, layers=[2, 4], dtype="float32")
    activations = load_activations(tmp_path)
    batch = activations.__getitems__([0, 1, 2, 3])
    assert batch["image_id"].tolist() == [1, 4, 1, 4] and batch["view"].tolist() == [0, 0, 1, 1]
    pixel_values = images.__getitems__([0, 1, 2, 3])["pixel_values"]
    expected = trajectory(teacher, pixel_values)[:, [2, 4]]
    assert batch["states"].dtype == torch.float32
    torch.testing.assert_close(batch["states"], expected, rtol=1e-6, atol=1e-6)
    assert verify_activations(tmp_path) == {}


def extract_many(path):
    """A run of a second or two: 80 shards of two rows."""
    teacher = tiny_teacher()
    write_activations(teacher, grey_images(160), path, batch_size=2, shard_megabytes=0)


def start_extraction(path):
    path.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=extract_many, args=(path,))
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path):
    start_extraction(tmp_path / "whole").join()
    expected = checksums(tmp_path / "whole")
    assert len(expected) == 80
    rng, kills, in_the_middle = random.Random(0), 0, 0
    for number in range(60):
        path = tmp_path / f"killed_{number % 4}"  # each is killed several times
        there = len(list(path.glob("data-*.arrow")))
        process = start_extraction(path)
        # after so many shards more, and a moment: a clock would depend on what else is running
        more = rng.randrange(15)
        while process.is_alive() and len(list(path.glob("data-*.arrow"))) < there + more:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        kills += process.is_alive()
        process.kill()
        process.join()
        named = sorted(path.glob("data-*.arrow"))
        in_the_middle += 0 < len(named) < len(expected)
        for shard in named:  # whatever has a name is whole
            assert shard_facts(shard)["xxh3_128"] == expected[shard.name]
        if kills >= 12 and in_the_middle >= 4:
            break
    assert kills >= 12 and in_the_middle >= 4
    for number in range(4):
        path = tmp_path / f"killed_{number}"
        start_extraction(path).join()
        assert checksums(path) == expected
        assert sorted(load_activations(path).scalars["image_id"].tolist()) == list(range(160))
        files = [file for file in path.iterdir() if file.name != ".lock"]
        assert {file.suffix for file in files} == {".arrow", ".json", ".md"}
        assert verify_activations(path) == {}


def test_two_processes_write_what_one_writes(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    command = ["training/extract_activations.py", "--teacher", tmp_path / "teacher", "--views", "2"]
    command += ["--num_images", "45", "--batch_size", "8", "--shard_megabytes", "0"]
    alone = {"OMP_NUM_THREADS": "1"}  # as torchrun sets it: sums in the same order
    run(sys.executable, *command, "--output_dir", tmp_path / "one", **alone)
    two = [*TWO_PROCESSES, *command, "--output_dir", tmp_path / "two"]
    run(*two, ACCELERATE_USE_CPU="true", **alone)
    assert len(checksums(tmp_path / "one")) == 12  # 90 rows: the last shard has two
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    lost = sorted((tmp_path / "two").glob("data-*.arrow"))[5]
    lost.unlink()
    run(*two, "--resume", ACCELERATE_USE_CPU="true", **alone)
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    assert shard_facts(lost)["xxh3_128"] == checksums(tmp_path / "one")[lost.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("a bug")])
def test_an_error_while_writing_keeps_the_shards_before_it(
    teacher, images, tmp_path, monkeypatch, error
):
    record, calls = writing._record, []

    def fail_at_the_fourth(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise error
        return record(*arguments)

    monkeypatch.setattr(writing, "_record", fail_at_the_fourth)
    with pytest.raises(type(error), match=str(error.args[-1])):
        write_activations(teacher, images, tmp_path, batch_size=2, shard_megabytes=0)
    assert len(list(tmp_path.glob("data-*.arrow"))) == 3 and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(FileNotFoundError, match="not a finished activation dataset"):
        load_activations(tmp_path)
    monkeypatch.undo()
    write_activations(teacher, images, tmp_path, batch_size=2, shard_megabytes=0)
    assert verify_activations(tmp_path) == {}
