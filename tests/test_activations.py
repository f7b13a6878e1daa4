import shutil
from collections import namedtuple

import datasets
import numpy as np
import pytest
import torch

from raptor_hf.activations import load_activations
from raptor_hf.extraction import write_activations
from raptor_hf.teachers import trajectory


@pytest.fixture
def store(teacher, images, tmp_path):
    """Ten trajectories (5 images in 2 views) in five shards of two rows."""
    path = tmp_path / "store"
    path.mkdir()
    write_activations(teacher, images, path, batch_size=2, shard_megabytes=0)
    return path


def test_reader_gives_the_teachers_states_in_any_order(store, teacher, images):
    activations = load_activations(store, teacher=teacher)
    assert len(activations) == 10
    rows = [9, 0, 4, 4, 7]
    batch = activations.__getitems__(rows)
    given = images.__getitems__(rows)
    expected = trajectory(teacher, given["pixel_values"]).half()
    assert batch["states"].dtype == torch.float16
    torch.testing.assert_close(batch["states"], expected, rtol=1e-3, atol=1e-3)
    for name in ("label", "image_id", "view"):
        assert torch.equal(batch[name], given[name])
    one = activations[9]
    assert torch.equal(one["states"], batch["states"][0])


def test_some_layers_only(store):
    everything, some = load_activations(store), load_activations(store, layers=[2, 3, 4])
    rows = [3, 8]
    states = some.__getitems__(rows)["states"]
    assert torch.equal(states, everything.__getitems__(rows)["states"][:, 2:5])
    with pytest.raises(
        ValueError, match=r"holds the layers \[0, 1, 2, 3, 4, 5, 6\]; asked for \[2, 7\]"
    ):
        load_activations(store, layers=[2, 7])


def test_anyone_can_open_it_with_datasets(store):
    dataset = datasets.load_from_disk(str(store))
    assert dataset.features["layer_3"] == datasets.Array2D((7, 24), "float16")
    assert dataset["image_id"][:] == [0, 1, 2, 3, 4] * 2
    states = dataset.with_format("numpy", dtype=np.float16)[5]["layer_3"]
    ours = load_activations(store)[5]["states"][3]
    assert np.array_equal(states, ours.numpy())


def test_the_manifest_says_where_it_comes_from(store, images):
    manifest = load_activations(store).manifest
    assert manifest["image_size"] == [8, 8]
    assert manifest["transform"]["crop_size"] == {"height": 8, "width": 8}
    assert (manifest["num_images"], manifest["views"], manifest["seed"]) == (5, 2, 3)
    assert {"torch", "transformers", "commit"} <= set(manifest["environment"])
    assert manifest["dtype"] == "float16"


def test_a_resumed_store_has_the_same_bytes(store, teacher, images, tmp_path):
    shards = sorted(store.glob("data-*.arrow"))
    assert len(shards) == 5
    before = {shard.name: shard.read_bytes() for shard in shards}
    shards[1].unlink()
    shards[4].unlink()
    (store / "data-00001-of-00005.tmp").write_bytes(b"half")
    write_activations(teacher, images, store, batch_size=2, shard_megabytes=0)
    assert {shard.name: shard.read_bytes() for shard in store.glob("data-*.arrow")} == before
    assert not list(store.glob("*.tmp"))


def test_damage_is_named(store, tmp_path):
    shard = store / "data-00002-of-00005.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="data-00002-of-00005.arrow .* is truncated or changed"):
        load_activations(store)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="data-00002-of-00005.arrow .* is missing"):
        load_activations(store)
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        load_activations(store)


def test_another_teacher_is_refused(store, teacher):
    with torch.no_grad():
        teacher.layernorm.bias[0] += 1
    with pytest.raises(ValueError, match="activations of another teacher"):
        load_activations(store, teacher=teacher)


def test_values_beyond_float16_are_an_error_with_layer_and_image(teacher, images, tmp_path):
    with torch.no_grad():
        teacher.encoder.layer[2].layer_scale2.lambda1.fill_(1e8)
    with pytest.raises(
        ValueError, match="after layer 3 of image 0 holds values that float16 can't"
    ):
        write_activations(teacher, images, tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


def test_a_full_disk_is_noticed_before_writing(teacher, images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 kB are free. Store less"):
        write_activations(teacher, images, tmp_path)
    assert not list(tmp_path.iterdir())
