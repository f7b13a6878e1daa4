"""The file that says how a Raptor was trained."""

import copy
import json

import pytest

from raptor_hf.activations import OnlineActivations
from raptor_hf.distillation.arguments import BlockArguments, ObjectiveArguments
from raptor_hf.distillation.blocks import make_span, raptor_from_blocks, save_blocks
from raptor_hf.distillation.provenance import source_inputs, training_facts, write_training
from raptor_hf.loop.arguments import LoopArguments


def test_training_facts_name_all_stages_and_no_folders(teacher, tmp_path):
    teacher.name_or_path = str(tmp_path / "somebody" / "teacher")
    (tmp_path / "somebody" / "teacher").mkdir(parents=True)
    blocks, raptor = tmp_path / "blocks", tmp_path / "raptor"
    for folder in (blocks, raptor):
        folder.mkdir()
        # three parts: the second one was resumed after 5 s, the third after 7
        seconds = (2.5, 5.0, 3.0, 7.0, 1.0)
        lines = (json.dumps({"step": n, "seconds": s}) for n, s in enumerate(seconds))
        (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    loop = {"steps": 10, "batch_size": 4, "learning_rate": 0.1, "seed": 3}
    options = {"dataset": "/home/somebody/trees"}
    first = LoopArguments(output_dir=str(blocks), **loop)
    write_training(teacher, first, ObjectiveArguments(), BlockArguments(), **options)
    second = LoopArguments(output_dir=str(raptor), **loop)
    write_training(teacher, second, ObjectiveArguments(), blocks=str(blocks), **options)
    facts = training_facts(raptor)
    assert facts["teacher"]["name"] == "teacher" and len(facts["teacher"]["weights_sha256"]) == 64
    assert facts["dataset"] == "trees" and "somebody" not in json.dumps(facts)
    before, last = facts["stages"]
    assert loop.items() <= last["arguments"].items() and "init" not in last["arguments"]
    assert "init" in before["arguments"]
    assert (last["images"], last["seconds"], last["num_processes"]) == (40, 13.0, 1)
    assert training_facts(tmp_path) is None


def test_blocks_of_another_teacher_are_refused(teacher, tmp_path):
    save_blocks([make_span(teacher, 0, 6)], tmp_path)
    (tmp_path / "log.jsonl").touch()
    write_training(teacher, LoopArguments(output_dir=str(tmp_path)), dataset="digits")
    raptor_from_blocks(teacher, [6], tmp_path)
    other = copy.deepcopy(teacher)
    other.layernorm.bias.data += 1
    with pytest.raises(ValueError, match="made from another teacher"):
        raptor_from_blocks(other, [6], tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no blocks"):
        raptor_from_blocks(teacher, [6], tmp_path / "nowhere")


def test_inputs_change_with_what_a_teacher_computes(teacher, images):
    before = source_inputs(teacher, OnlineActivations(teacher, images))
    assert before == source_inputs(copy.deepcopy(teacher), OnlineActivations(teacher, images))
    images.processor.image_mean = [0.0, 0.0, 0.0]
    now = source_inputs(teacher, OnlineActivations(teacher, images))
    assert [name for name in now if now[name] != before[name]] == ["processor"]
    other = copy.deepcopy(teacher)
    other.config.layer_norm_eps = 0.1  # no weight, and another function
    now = source_inputs(other, OnlineActivations(teacher, images))
    assert [name for name in now if now[name] != before[name]] == ["config", "processor"]
