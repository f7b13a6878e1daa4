"""Cards, and the way to the Hub: what is written, what is refused, what is pushed."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import DPTImageProcessorPil

from evaluation.report import PUBLISHED
from raptor_hf.activations.store import load_activations
from raptor_hf.data import make_processor
from raptor_hf.distillation.provenance import training_facts
from raptor_hf.hub.model_card import make_model_card, planned_card, task_of
from raptor_hf.hub.publishing import (
    activation_files,
    check_outputs,
    check_read_back,
    check_weights,
    stage_model,
    write_files,
)
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.modeling_raptor_heads import AUTO_CLASSES
from raptor_hf.runs.files import public_name, read_json
from raptor_hf.tasks.task import TASKS
from tests.helpers import make
from tests.hub_server import Blob, Repository, hub_server
from tests.programs import ROOT, WITHOUT_THE_PACKAGE

TEMPLATE, PLANNED = ROOT / "model_cards" / "template.md", ROOT / "model_cards" / "planned.md"
FIGURES = {
    "classification": {"accuracy": 0.8125},
    "segmentation": {"miou": 0.25},
    "depth": {"rmse_m": 0.5},
}


def results_of(task):
    """Of the teacher and a Raptor, two seeds each; seed 0 tells how it was trained."""
    rows = []
    for seed in (0, 1):
        figures = {name: value + seed / 16 for name, value in FIGURES[task].items()}
        facts = {"task": task, "seed": seed, "num_images": 1000, "environment": {"torch": "2"}}
        facts |= {"dataset": "/data/of/mine/leaves", "split": "val", "metrics": figures}
        rows.append({"model": "teacher", "phases": None, "block_parameters": 400, **facts})
        stage = {"program": "distill_raptor", "arguments": {"steps": 100, "loss": "mse"}}
        stage |= {"images": 6400, "seconds": 12.3, "num_processes": 2}
        teacher = {"name": "facebook/dinov2-small", "revision": "abc", "weights_sha256": 32 * "12"}
        training = {"teacher": teacher, "dataset": "trees", "stages": [stage]}
        more = {"phases": [4, 2], "block_parameters": 100, "training": training}
        rows.append({"model": "raptor_k2", **more, **facts})
    return rows


@pytest.fixture
def model_dir(teacher, tmp_path):
    """A classifier as `probe.py` saves it, with files beside it that are nobody's business."""
    return saved_model("classification", teacher, tmp_path / "models" / "raptor_k2")


def saved_model(task, teacher, folder):
    model = make(TASKS[task].model_class, teacher, num_labels=3)
    model.config.teacher_config.name_or_path = "/home/somebody/teacher"
    model.save_pretrained(folder)
    dense = DPTImageProcessorPil(size={"height": 8, "width": 8})
    (make_processor(8) if task == "classification" else dense).save_pretrained(folder)
    (folder / "run.json").write_text('{"secret": "/home/somebody"}')
    return folder


@pytest.mark.parametrize("task", FIGURES)
def test_what_the_hub_reads_of_a_card(task):
    results = results_of(task)
    card = make_model_card("raptor_k2", TASKS[task], results, TEMPLATE, snippet="pass", title="a/b")
    data = ModelCard(str(card)).data
    assert data.library_name == "transformers" and data.license == "apache-2.0"
    assert data.base_model == "facebook/dinov2-small" and data.datasets == ["trees"]
    [figure] = data.eval_results
    mean = next(iter(FIGURES[task].values())) + 1 / 32
    assert figure.metric_value == pytest.approx(mean, abs=5e-5)
    hub_task = {"classification": "image-classification", "segmentation": "image-segmentation"}
    assert data.pipeline_tag == figure.task_type == hub_task.get(task, "depth-estimation")
    assert (figure.dataset_name, figure.dataset_split) == ("leaves", "val")
    text = str(card)
    assert "25.0 % of the parameters" in text and "/data/of" not in text
    assert (
        "| distill_raptor | 6,400 images seen in 12 s by 2 process(es): steps 100, loss mse |"
        in text
    )
    assert "`facebook/dinov2-small`, revision abc" in text
    assert "in 1 stage(s), on the states of images of\n`trees`. Embeddings" in text
    assert "These are the arguments of one of 2 seeds." in text
    row = {"classification": "84.4 ± 4.4", "segmentation": "28.1 ± 4.4", "depth": "0.531 ± 0.044"}
    assert f"| {row[task]} | {row[task]} |" in text


def test_a_card_without_results_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="no depth results of 'raptor_k2'"):
        make_model_card(
            "raptor_k2", TASKS["depth"], results_of("segmentation"), TEMPLATE, snippet=""
        )
    alone = [row for row in results_of("depth") if row["model"] != "teacher"]
    with pytest.raises(ValueError, match="no depth results of the teacher"):
        make_model_card("raptor_k2", TASKS["depth"], alone, TEMPLATE, snippet="")
    make(RaptorModel, teacher).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a card is made of a Raptor with a head"):
        task_of(tmp_path)


def test_the_committed_cards_of_untrained_models_are_those_of_their_recipes():
    cards = sorted((ROOT / "model_cards" / "imagenet").glob("*.md"))
    recipes = sorted((ROOT / "training" / "recipes").glob("imagenet_raptor_*.yaml"))
    assert [card.stem for card in cards] == [recipe.stem for recipe in recipes]
    for file, recipe in zip(cards, recipes, strict=True):
        card = planned_card(recipe, read_json(PUBLISHED), PLANNED)
        assert file.read_text() == str(card)
        assert "Nobody has trained this model yet" in str(card)
        data = ModelCard(str(card)).data
        assert data.eval_results is None and "not-trained-yet" in data.tags
        assert data.base_model == "facebook/dinov2-with-registers-base"
    with pytest.raises(ValueError, match="has no phases"):
        planned_card(recipes[0].with_name("digits_raptor.yaml"), read_json(PUBLISHED), PLANNED)


@pytest.mark.slow
def test_a_staged_model_holds_what_it_needs_and_nothing_else(model_dir, tmp_path):
    results = results_of("classification")
    stage_model(model_dir, tmp_path / "staged", results, TEMPLATE, title="me/raptor")
    staged = {file.name: file for file in (tmp_path / "staged").iterdir()}
    code = {"configuration_raptor.py", "modeling_raptor.py", "modeling_raptor_heads.py"}
    others = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(staged) == code | others
    for name in ("README.md", "config.json", "preprocessor_config.json"):
        assert "somebody" not in staged[name].read_text()
        assert str(tmp_path) not in staged[name].read_text()
    ours, theirs = (
        load_file(model_dir / "model.safetensors"),
        load_file(staged["model.safetensors"]),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="is not empty"):
        stage_model(model_dir, tmp_path / "staged", results, TEMPLATE, title="me/raptor")

    weights = load_file(staged["model.safetensors"])
    weights["raptor.blocks.1.layer_scale1"][3] += 1e-3
    save_file(weights, staged["model.safetensors"], metadata={"format": "pt"})
    model = AUTO_CLASSES["AutoModelForImageClassification"].from_pretrained(model_dir)
    with pytest.raises(RuntimeError, match="other weights .*layer_scale1.* It was not published"):
        check_read_back(model, tmp_path / "staged", "AutoModelForImageClassification")
    save_file(ours, staged["model.safetensors"], metadata={"format": "pt"})
    config = read_json(staged["config.json"])
    config["block_norm_eps"] = 0.1  # the same weights compute something else
    staged["config.json"].write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="gives other outputs .* It was not published"):
        check_read_back(model, tmp_path / "staged", "AutoModelForImageClassification")


def test_weights_are_read_back_exactly_and_outputs_to_a_tolerance(tmp_path):
    torch.manual_seed(0)
    expected = {"0": torch.randn(3, 7, 24), "answer": torch.zeros(3, 2)}
    check_weights(dict(expected), expected, tmp_path)
    check_outputs(dict(expected), expected, tmp_path)
    rounded = {**expected, "0": expected["0"] * (1 + 1.2e-7)}
    check_outputs(rounded, expected, tmp_path)
    with pytest.raises(RuntimeError, match=r"other weights .*1 differ: \['0'\]"):
        check_weights(rounded, expected, tmp_path)
    with pytest.raises(RuntimeError, match=r"other weights .*1 differ: \['answer'\]"):
        check_weights({"0": expected["0"]}, expected, tmp_path)
    for wrong in (expected["0"] * (1 + 1e-3), expected["0"] * torch.nan):
        with pytest.raises(RuntimeError, match="expected errors up to 1e-05 .* found 0: "):
            check_outputs({**expected, "0": wrong}, expected, tmp_path)


def client(hub, folder, *command, check=True):
    """A program of this project, or a user's, that knows only this Hub."""
    environment = {**hub.environment(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_published_model_is_loaded_by_its_card(model_dir, tmp_path):
    (tmp_path / "results").mkdir()
    for number, row in enumerate(results_of("classification")):
        (tmp_path / "results" / f"{number}.json").write_text(json.dumps(row))
    publish = [ROOT / "model_cards" / "publish.py", "--model", model_dir, "--results"]
    publish += [tmp_path / "results", "--repo_id", "me/raptor"]
    with hub_server() as hub:
        hub.repositories["models/me/raptor"] = repo = Repository("models/me/raptor")
        refused = client(hub, tmp_path, *publish, "--private", check=False)
        assert "is there already, and public. Nothing was uploaded" in refused.stderr
        old = {
            name: Blob(b"old", lfs=False) for name in ("pytorch_model.bin", "README.md", "a.png")
        }
        repo.add("main", "an older version", old)
        done = client(hub, tmp_path, *publish)
        first, last = hub.commits("me/raptor")[2:]
        assert f"with revision {first}" in done.stdout
        assert hub.token not in done.stdout + done.stderr
        pushed = hub.files("me/raptor")
        assert set(pushed) == set(hub.files("me/raptor", first))
        assert "pytorch_model.bin" not in pushed and pushed["a.png"] == b"old"
        assert hub.files("me/raptor", first)["README.md"] == b"old"
        assert pushed["model.safetensors"] == (model_dir / "model.safetensors").read_bytes()
        snippet = pushed["README.md"].decode().split("```python\n")[1].split("```")[0]
        assert f'name, revision = "me/raptor", "{first}"' in snippet
        done = client(hub, tmp_path, "-c", WITHOUT_THE_PACKAGE + snippet)
        label, states = done.stdout.split()
        assert label in ("LABEL_0", "LABEL_1", "LABEL_2") and states == "7"


@pytest.mark.slow
def test_published_activations_name_no_folder_of_this_machine(store, tmp_path):
    program = ROOT / "model_cards" / "publish.py"
    publish = [program, "--activations", store, "--repo_id", "me/states"]
    manifest = read_json(store / "manifest.json")
    manifest["teacher"]["name"] = str(tmp_path / "vit")
    (store / "manifest.json").write_text(json.dumps(manifest))
    with hub_server() as hub:
        hub.repositories["datasets/me/states"] = repo = Repository("datasets/me/states")
        repo.add("main", "an older version", {"data-00009-of-00010.arrow": Blob(b"old", lfs=True)})
        client(hub, tmp_path, *publish)
        files = hub.files("me/states", repo_type="dataset")
        assert len(hub.commits("me/states", "dataset")) == 3
    assert set(files) == {file.name for file in store.iterdir()}  # the old shard is gone
    write_files(activation_files(store), tmp_path / "dry")
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "dry").iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        write_files({}, tmp_path / "dry")
    assert str(tmp_path).encode() not in b"".join(files.values())
    (tmp_path / "again").mkdir()
    for name, content in files.items():
        (tmp_path / "again" / name).write_bytes(content)
    again, before = load_activations(tmp_path / "again"), load_activations(store)
    assert torch.equal(again[3]["states"], before[3]["states"])
    assert again.manifest["teacher"]["name"] == "vit"

    shard = sorted(store.glob("data-*.arrow"))[1]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name} .* is damaged"):
        activation_files(store)


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_the_shards_of_a_hostile_dataset_stay_inside_the_folder(store, file):
    content = read_json(store / file)
    if file == "state.json":
        content["_data_files"].append({"filename": "/evil.arrow"})
    else:
        content["shards"]["../evil.arrow"] = {}
    (store / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names shards outside the folder: .*evil.arrow"):
        load_activations(store)


def test_training_facts_follow_the_runs_and_name_no_folders(teacher, tmp_path):
    blocks, raptor = tmp_path / "blocks", tmp_path / "raptor"
    for folder, program in ((blocks, "pretrain_blocks"), (raptor, "distill_raptor")):
        folder.mkdir()
        arguments = {"steps": 10, "batch_size": 4, "learning_rate": 0.1, "seed": 3}
        arguments |= {"ffn": "swiglu" if folder is blocks else "gelu"}  # the latter of no new block
        arguments |= {"teacher": "/home/somebody/teacher", "activations": "/home/somebody/states"}
        arguments |= {"blocks": str(blocks)} if folder is raptor else {}
        run = {"program": program, "arguments": arguments, "environment": {"num_processes": 2}}
        (folder / "run.json").write_text(json.dumps(run))
        # three parts: the second one was resumed after 5 s, the third after 7
        seconds = (2.5, 5.0, 3.0, 7.0, 1.0)
        lines = (json.dumps({"step": n, "seconds": s}) for n, s in enumerate(seconds))
        (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    facts = training_facts(raptor, teacher)
    assert [stage["program"] for stage in facts["stages"]] == ["pretrain_blocks", "distill_raptor"]
    recipe = {"steps": 10, "batch_size": 4, "learning_rate": 0.1, "seed": 3}
    assert facts["stages"][1] == {
        "program": "distill_raptor", "arguments": recipe, "images": 40, "seconds": 13.0,
        "num_processes": 2,
    }  # fmt: skip
    assert facts["stages"][0]["arguments"] == {**recipe, "ffn": "swiglu"}
    assert "somebody" not in json.dumps(facts)
    assert facts["dataset"] is None
    (tmp_path / "states").mkdir()
    run["arguments"]["activations"] = str(tmp_path / "states")
    (raptor / "run.json").write_text(json.dumps(run))
    first = json.loads((blocks / "run.json").read_text())
    first["arguments"]["activations"] = str(tmp_path / "states")
    (blocks / "run.json").write_text(json.dumps(first))
    extraction = {"arguments": {"dataset": "/home/somebody/trees"}}
    (tmp_path / "states" / "run.json").write_text(json.dumps(extraction))
    assert training_facts(raptor, teacher)["dataset"] == "trees"
    (blocks / "run.json").unlink()  # one of the stages can't be told any more
    assert training_facts(raptor, teacher) is None
    assert training_facts(tmp_path, teacher) is None
    assert public_name("facebook/dinov2-small") == "facebook/dinov2-small"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("data/of/mine") == public_name("../mine") == "mine"
