import pytest
import torch
from transformers import ViTConfig, ViTModel

from raptor_hf import RaptorModel
from raptor_hf.teachers import hub_commit, load_backbone, teacher_identity, trajectory


def test_a_backbone_is_frozen_and_gives_its_trajectory(teacher, pixel_values, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = load_backbone(str(tmp_path / "teacher"))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    states = trajectory(loaded, pixel_values)
    assert states.shape == (3, 7, 7, 24)
    torch.testing.assert_close(loaded.layernorm(states[:, -1]), loaded(pixel_values)[0])


def test_teacher_and_raptor_load_alike(teacher, pixel_values, tmp_path):
    raptor = RaptorModel.from_teacher(teacher, [4, 2])
    raptor.save_pretrained(tmp_path)
    assert trajectory(load_backbone(str(tmp_path)), pixel_values).shape == (3, 7, 7, 24)


def test_identity_follows_the_weights(teacher):
    before = teacher_identity(teacher)["weights_sha256"]
    assert teacher_identity(teacher)["weights_sha256"] == before
    teacher.layernorm.bias[3] += 1e-6
    assert teacher_identity(teacher)["weights_sha256"] != before


def test_the_commit_of_a_hub_model_is_read_off_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo, commit = tmp_path / "models--someone--vit", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("someone/vit") == commit
    assert hub_commit("someone/vit", commit) == commit
    assert hub_commit("someone/else") is None
    assert hub_commit(str(tmp_path)) is None


def test_foreign_families_and_missing_weights_are_refused(teacher, tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(ValueError, match="got a model of type 'vit'"):
        load_backbone(str(tmp_path / "vit"))
    weights = teacher.state_dict()
    del weights["layernorm.weight"]
    teacher.save_pretrained(tmp_path / "broken", state_dict=weights)
    with pytest.raises(ValueError, match="lacks weights of its own model: .'layernorm.weight'"):
        load_backbone(str(tmp_path / "broken"))
