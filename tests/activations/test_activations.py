import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch

from raptor_hf.activations.__main__ import main
from raptor_hf.activations.format import verify_activations
from raptor_hf.activations.store import load_activations
from raptor_hf.teachers import trajectory


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
    one = activations.__getitems__([9])
    assert torch.equal(one["states"][0], batch["states"][0])


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
    ours = load_activations(store).__getitems__([5])["states"][0, 3]
    assert np.array_equal(states, ours.numpy())


def test_another_teacher_is_refused(store, teacher):
    with torch.no_grad():
        teacher.layernorm.bias[0] += 1
    with pytest.raises(ValueError, match="activations of another teacher"):
        load_activations(store, teacher=teacher)


def test_workers_that_are_not_forked_open_the_files_themselves(store):
    activations = load_activations(store, layers=[1, 2])
    assert len(pickle.dumps(activations)) < 1000
    again = pickle.loads(pickle.dumps(activations))
    states = [source.__getitems__([7])["states"] for source in (again, activations)]
    assert torch.equal(*states)


def test_large_states_are_copied_by_threads_to_the_same_place(store, monkeypatch):
    rows = [8, 0, 3, 3, 9, 1, 6]
    expected = load_activations(store).__getitems__(rows)["states"]
    monkeypatch.setattr("raptor_hf.activations.store.WORTH_A_THREAD", 0)
    assert torch.equal(load_activations(store).__getitems__(rows)["states"], expected)


def test_the_hub_streams_it(store, tmp_path):
    # on the Hub the card says where the data are; a local folder with a state.json is refused
    uploaded = tmp_path / "uploaded"
    shutil.copytree(store, uploaded, ignore=shutil.ignore_patterns("state.json"))
    streamed = datasets.load_dataset(str(uploaded), split="train", streaming=True)
    assert streamed.features == datasets.load_from_disk(str(store)).features
    rows = list(streamed)
    assert [row["image_id"] for row in rows] == [0, 1, 2, 3, 4] * 2
    states = torch.tensor(rows[7]["layer_2"], dtype=torch.float16)
    ours = load_activations(store).__getitems__([7])["states"]
    assert torch.equal(states, ours[0, 2])


def flip_a_bit(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


DAMAGES = {
    "is damaged": flip_a_bit,
    "instead of": lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
    "is missing": lambda shard: shard.unlink(),
}


def test_every_damage_is_named_with_its_repair(store, capsys):
    main(["verify", str(store)])
    assert "is complete: 5 images × 2 views, layers [0, 1, 2, " in capsys.readouterr().out
    assert verify_activations(store) == {}
    shards = sorted(store.glob("data-*.arrow"))[1:4]
    for damage, shard in zip(DAMAGES.values(), shards, strict=True):
        damage(shard)
    problems = verify_activations(store)
    assert list(problems) == [shard.name for shard in shards]
    for problem, words in zip(problems.values(), DAMAGES, strict=True):
        assert words in problem and "--resume" in problem
    assert list(verify_activations(store, checksums=False)) == list(problems)[1:]
    with pytest.raises(ValueError, match="instead of"):
        load_activations(store)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(store)])
    assert str(stopped.value).splitlines() == list(problems.values())
    (store / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        main(["verify", str(store)])
