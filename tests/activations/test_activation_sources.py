"""States from a store and from the teacher itself: the same through one interface."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.activations.arguments import ActivationArguments, ImageArguments
from raptor_hf.activations.online import (
    OnlineActivations,
    check_all_layers,
    open_source,
    stream_states,
)
from raptor_hf.activations.store import load_activations
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ReadingArguments, choose_images, make_processor
from raptor_hf.data.arguments import CropArguments
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.loop.batches import StepSampler
from raptor_hf.teachers import trajectory
from raptor_hf.teachers.states import up_to_layer
from tests.families import tiny_model
from tests.helpers import assert_same_outputs
from training import distill_raptor


def test_online_states_are_the_teachers(teacher, images):
    rows = [7, 0, 3]
    everything = OnlineActivations(teacher, images)
    batch = everything.__getitems__(rows)
    expected = trajectory(teacher, batch["pixel_values"])
    assert_same_outputs(everything.states(batch), expected)
    some = OnlineActivations(teacher, images, layers=[1, 3])
    assert_same_outputs(some.states(batch), expected[:, [1, 3]])
    backwards = OnlineActivations(teacher, images, layers=[2, 1, 0])
    assert_same_outputs(backwards.states(batch), expected[:, [2, 1, 0]])
    assert (everything.layers, some.layers, some.depth) == ([0, 1, 2, 3, 4, 5, 6], [1, 3], 6)
    with pytest.raises(ValueError, match=r"layers 0 to 6, \[2, 7\] are asked for"):
        OnlineActivations(teacher, images, layers=[2, 7])


def test_the_teacher_runs_no_deeper_than_it_must(teacher, images):
    calls = []
    for layer in teacher.encoder.layer:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    online = OnlineActivations(teacher, images, layers=range(2, 5))
    batch = online.__getitems__([0])
    calls.clear()
    online.states(batch)
    assert len(calls) == 4
    shallow = up_to_layer(teacher, 4)
    pairs = zip(
        shallow.encoder.layer.parameters(), teacher.encoder.layer.parameters(), strict=False
    )
    assert all(ours is theirs for ours, theirs in pairs)  # no second copy of the weights
    assert len(teacher.encoder.layer) == 6 and teacher.config.num_hidden_layers == 6


def test_bfloat16_is_close_and_has_no_gradients(teacher, images):
    teacher.requires_grad_(True)
    batch = images.__getitems__(range(10))
    exact = OnlineActivations(teacher, images).states(batch)
    rough = OnlineActivations(teacher, images, precision="bfloat16").states(batch)
    assert rough.dtype == torch.float32 and not rough.requires_grad
    error = (rough - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.02


def test_states_stream_over_either_source(teacher, images, store):
    online, stored = OnlineActivations(teacher, images), load_activations(store)
    assert online.layout == stored.layout == TokenLayout(1, 2)
    expected = stored.__getitems__(range(10))["states"].float()
    for source in (online, stored):
        check_all_layers(source)
        everything = torch.cat(list(stream_states(source, "all", batch_size=3))).float()
        torch.testing.assert_close(everything, expected, rtol=2e-3, atol=2e-3)
        assert sum(map(len, stream_states(source, "some", num_images=4, batch_size=3))) == 4
    with pytest.raises(ValueError, match="needs the states of all layers, 0 to 6"):
        check_all_layers(load_activations(store, layers=[0, 1, 2, 3, 4, 5]))


def test_images_are_chosen_once_and_for_all():
    assert choose_images(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    chosen = choose_images(1000, 10, 3)
    assert (np.diff(chosen) > 0).all() and chosen[-1] > 500
    assert np.array_equal(chosen, choose_images(1000, 10, 3))
    assert not np.array_equal(chosen, choose_images(1000, 10, 4))
    with pytest.raises(ValueError, match="between 1 and 5; got 6"):
        choose_images(5, 6, 0)


def test_arguments_that_contradict_each_other_are_refused(teacher, store):
    for activations, changed, word in (
        ("online", ImageArguments(), "online needs images: give --dataset"),
        (store, ImageArguments(views=3), "--views 3 is for --activations online"),
        (store, CropArguments(flip=0.1), "--flip 0.1 is for --activations online"),
        (store, ReadingArguments(resolution=[12]), r"--resolution \[12, 12\] .*of \[8, 8\] pixels"),
    ):
        source = ActivationArguments(teacher="t", activations=str(activations))
        parts = {
            type(part): part for part in (ImageArguments(), CropArguments(), ReadingArguments())
        }
        parts[type(changed)] = changed
        with pytest.raises(ValueError, match=word):
            open_source(source, *parts.values(), teacher, [0])


def test_every_other_batch_has_a_second_size(teacher, store, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    name, parts = str(tmp_path / "teacher"), (CropArguments(), ReadingArguments())
    source = ActivationArguments(teacher=name, activations="online", also_resolution=[12])
    digits = ImageArguments(dataset="digits", views=0)
    states = open_source(source, digits, *parts, teacher, [0, 6])
    loop = LoopArguments(output_dir=str(tmp_path), batch_size=4, steps=3)
    for number in (1, 2):  # parts of a batch have one size, also as a worker gets them
        processes = SimpleNamespace(
            num_processes=1, process_index=0, gradient_accumulation_steps=number
        )
        rows = pickle.loads(pickle.dumps(list(StepSampler(len(states), loop, processes))))
        counts = [states.states(states.__getitems__(part)).shape[:3:2] for part in rows]
        # 4 or 9 patches, and 3 other tokens
        assert counts == [(4 // number, tokens) for tokens in (7, 12, 7) for _ in range(number)]
    assert states.states(states.__getitems__([1])).shape[2] == 7
    with pytest.raises(ValueError, match="--also_resolution is for --activations online"):
        ActivationArguments(teacher=name, activations=str(store), also_resolution=[12])
    with pytest.raises(ValueError, match="teachers without rotary positions"):
        open_source(source, digits, *parts, tiny_model("dinov3_vit"), [0])


def test_a_raptor_learns_from_two_sizes(teacher, tmp_path, capsys):
    teacher.save_pretrained(tmp_path / "teacher")
    make_processor(8).save_pretrained(tmp_path / "teacher")
    flags = {"teacher": tmp_path / "teacher", "activations": "online", "dataset": "digits"}
    flags |= {"views": 0, "steps": 6, "batch_size": 8, "report_to": "none"}
    flags |= {"also_resolution": 12, "output_dir": tmp_path / "raptor"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    distill_raptor.main([*words, "--phases", "4", "2"])
    assert "layers, 9 tokens" in capsys.readouterr().out  # in the mean
    assert RaptorModel.from_pretrained(tmp_path / "raptor").config.phases == [4, 2]


def test_a_store_brings_the_image_processor_that_it_was_made_with(teacher, store, tmp_path):
    """Whatever lies beside the teacher by now."""
    make_processor(12).save_pretrained(tmp_path)
    source = ActivationArguments(teacher=str(tmp_path), activations=str(store))
    parts = (ImageArguments(), CropArguments(), ReadingArguments())
    stored = open_source(source, *parts, teacher, [0])
    assert stored.resolution == [8, 8] and stored.processor.to_dict() == make_processor(8).to_dict()
