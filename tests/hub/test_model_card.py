"""Model cards: metadata, tables, where the facts of the training come from."""

import json

import pytest
from huggingface_hub import ModelCard

from model_cards import publish
from raptor_hf.hub import model_card, write_model_card
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.runs.files import folder_digest
from raptor_hf.tasks.task import TASKS
from tests.helpers import make
from tests.programs import ROOT

TEMPLATE = ROOT / "model_cards" / "template.md"
FIGURES = {
    "classification": {"accuracy": 0.8125},
    "segmentation": {"miou": 0.25},
    "depth": {"rmse_m": 0.5},
}
TRAINING = {
    "teacher": {"name": "facebook/dinov2-small", "revision": "abc", "weights_sha256": 32 * "12"},
    "dataset": "somebody/trees",
    "stages": [
        {
            "program": "distill_raptor", "arguments": {"steps": 100, "loss": "mse"},
            "images": 6400, "seconds": 12.3, "num_processes": 2,
        }
    ],
}  # fmt: skip


def results_of(task):
    """Results of the teacher and a Raptor, two seeds each."""
    rows = []
    for seed in (0, 1):
        metrics = {name: value + seed / 16 for name, value in FIGURES[task].items()}
        facts = {"task": task, "seed": seed, "num_images": 1000, "environment": {"torch": "2"}}
        facts |= {"dataset": "leaves (2024)", "split": "val", "metrics": metrics}
        rows.append({"model": "teacher", "phases": None, "block_parameters": 400, **facts})
        training = {**TRAINING, "seed": seed} if seed else TRAINING
        more = {"phases": [4, 2], "block_parameters": 100, "training": training}
        rows.append({"model": "raptor_k2", **more, **facts})
    return rows


def saved_model(task, teacher, folder):
    """A Raptor with a head, and what its training left beside it."""
    make(TASKS[task].model_class, teacher, num_labels=3).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(TRAINING))
    return folder


@pytest.fixture
def not_run(monkeypatch):
    """Snippets are not run, but kept in a list."""
    snippets = []
    monkeypatch.setattr(model_card, "run_snippet", lambda snippet, folder: snippets.append(snippet))
    return snippets


@pytest.mark.parametrize("task", FIGURES)
def test_a_card_shows_results_and_training(task, teacher, tmp_path, not_run):
    folder = saved_model(task, teacher, tmp_path / "raptor_k2")
    exported = {"bytes": 4_640_000, "r2": 0.98765, "worst_cosine": 0.91}
    account = {"num_images": 32, "dataset": "oaks", "files": {"onnx/model_q4f16.onnx": exported}}
    account["weights"] = folder_digest(folder)
    (folder / "export.json").write_text(json.dumps(account))
    write_model_card(folder, results_of(task), TEMPLATE, repo_id="a/b", license="mit")
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.library_name == "transformers" and data.license == "mit"
    assert data.base_model == "facebook/dinov2-small" and data.datasets == ["somebody/trees"]
    [figure] = data.eval_results
    mean = next(iter(FIGURES[task].values())) + 1 / 32
    assert figure.metric_value == pytest.approx(mean, abs=5e-5)
    hub_task = {"classification": "image-classification", "segmentation": "image-segmentation"}
    assert data.pipeline_tag == figure.task_type == hub_task.get(task, "depth-estimation")
    assert (figure.dataset_name, figure.dataset_split) == ("leaves (2024)", "val")
    assert figure.dataset_type == "leaves-2024-"  # the Hub refuses other characters
    text = card.text
    assert "| `onnx/model_q4f16.onnx` | 4.64 | 0.9877 | 0.9100 |\n" in text and "`oaks`" in text
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert "25.0 % of the parameters" in text
    assert (
        "| distill_raptor | 6,400 images seen in 12 s by 2 process(es): steps 100, loss mse |"
        in text
    )
    assert "`facebook/dinov2-small`, revision abc" in text
    assert "in 1 stage(s), on the states of images of\n`somebody/trees`. Embeddings" in text
    assert "These are the arguments of one of 2 seeds." in text
    row = {"classification": "84.4 ± 4.4", "segmentation": "28.1 ± 4.4", "depth": "0.531 ± 0.044"}
    assert f"| {row[task]} | {row[task]} |" in text
    # the card loads from the Hub; the snippet that was run, from the folder
    assert 'name, revision = "a/b", "<commit>"' in text
    assert [json.dumps(str(folder)) in snippet for snippet in not_run] == [True]


def test_local_data_and_teachers_are_no_links(teacher, tmp_path, not_run):
    folder = saved_model("depth", teacher, tmp_path / "raptor_k2")
    local = {**TRAINING, "dataset": "trees", "teacher": {**TRAINING["teacher"], "revision": None}}
    (folder / "training.json").write_text(json.dumps(local))
    results = [row | {"training": local} for row in results_of("depth")]
    write_model_card(folder, results, TEMPLATE)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is card.data.datasets is card.data.license is None
    assert "revision none (local)" in card.text and "`trees`" in card.text


def test_a_model_that_no_program_trained_has_a_card_too(teacher, tmp_path, not_run, monkeypatch):
    folder = saved_model("depth", teacher, tmp_path / "raptor_k2")
    (folder / "training.json").unlink()
    # training.json of the working directory is another model's
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    monkeypatch.chdir(tmp_path)
    results = [row | {"training": None} for row in results_of("depth")]
    write_model_card(folder, results, TEMPLATE)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is card.data.datasets is None
    assert "trees" not in card.text and "stage(s)" not in card.text
    assert "# raptor_k2" in card.text


def test_a_card_without_results_is_refused(teacher, tmp_path, not_run):
    folder = saved_model("depth", teacher, tmp_path / "raptor_k2")
    alone = [row for row in results_of("depth") if row["model"] != "teacher"]
    others = [row | {"training": {**TRAINING, "seed": 7}} for row in results_of("depth")]
    make(RaptorModel, teacher).save_pretrained(tmp_path / "bare")
    stale = saved_model("depth", teacher, tmp_path / "old" / "raptor_k2")
    (stale / "export.json").write_text(json.dumps({"weights": "another digest"}))
    for model_dir, results, message in (
        (folder, results_of("segmentation"), "depth results of 'raptor_k2'"),
        (folder, alone, "and of 'teacher'"),
        (folder, others, "are those of another model"),
        (stale, results_of("depth"), "is about other weights: run model_cards/export.py"),
        (tmp_path / "bare", results_of("depth"), "a card needs a Raptor with a head"),
    ):
        with pytest.raises(ValueError, match=message):
            write_model_card(model_dir, results, TEMPLATE)
    assert not not_run and not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--repo_id", "me/my raptor", "--model", "nowhere", "--results", "nowhere"], "my raptor"),
        (["--repo_id", "me/raptor"], "Give one of --model"),
        (["--repo_id", "me/raptor", "--model", "nowhere"], "--results FOLDER belongs"),
        (["--repo_id", "me/states", "--activations", "nowhere", "--dry_run"], "activations verify"),
    ],
)
def test_a_wrong_command_is_refused_at_once(flags, word):
    with pytest.raises(ValueError, match=word):
        publish.main(flags)


@pytest.mark.slow
def test_a_card_whose_snippet_fails_is_not_written(teacher, tmp_path):
    folder = saved_model("classification", teacher, tmp_path / "raptor_k2")  # without a processor
    with pytest.raises(RuntimeError, match="usage snippet of the model card fails"):
        write_model_card(folder, results_of("classification"), TEMPLATE)
    assert not (folder / "README.md").exists()
