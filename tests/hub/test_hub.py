"""Publishing and reading over the Hub's own protocol, with the unmodified clients.

The clients read their environment when they are imported: each is a process of its own, with a
cache of its own.
"""

import json
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from model_cards import publish
from raptor_hf.data import make_processor
from raptor_hf.hub import publish_activations
from tests.hub.test_model_card import results_of, saved_model
from tests.hub_server import TOKEN, Repository, hub_server
from tests.programs import ROOT, WITHOUT_THE_PACKAGE

PUBLISH = ROOT / "model_cards" / "publish.py"

READ_A_DATASET = """
import datasets, json, sys

revision, store = sys.argv[1:]
published = datasets.load_from_disk(store)
read = datasets.load_dataset("me/states", split="train", revision=revision)
assert read.features == published.features, read.features
assert read.data.table.equals(published.data.table)
print(len(read))
"""

PUBLISH_IMAGES = """
import datasets
from huggingface_hub import HfApi
from pathlib import Path
from PIL import Image

CARD = '''---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.parquet}]
- config_name: large
  data_files: [{split: train, path: large/train.parquet}, {split: test, path: large/test.parquet}]
---
'''
features = datasets.Features(
    img=datasets.Image(), labels=datasets.ClassLabel(names=["cat", "dog"]),
    words=datasets.Value("string"),
)
for file, number in (("small/train", 2), ("large/train", 5), ("large/test", 3)):
    images = [Image.new("L", (8, 8), 20 * n) for n in range(number)]
    words = ["zebra" if n % 2 else "ant" for n in range(number)]
    columns = {"img": images, "labels": [n % 2 for n in range(number)], "words": words}
    Path(f"pets/{file}").parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(f"pets/{file}.parquet")
Path("pets/README.md").write_text(CARD)
HfApi().create_repo("user/pets", repo_type="dataset")
HfApi().upload_folder(repo_id="user/pets", repo_type="dataset", folder_path="pets")
"""

READ_IMAGES = """
from raptor_hf.data import ImageViews, ReadingArguments, load_images, make_processor

def read(split="train", **options):
    return load_images("user/pets", split, ReadingArguments(**options))

def refused(kind, word, *arguments, **options):
    try:
        read(*arguments, **options)
    except kind as error:
        assert word in str(error), repr(error)
    else:
        raise AssertionError(f"{options} raised nothing")

large = {"dataset_config": "large", "image_column": "img"}
refused(ValueError, "small", image_column="img")  # the configurations are listed
refused(ValueError, "large", **{**large, "dataset_config": "huge"})
refused(ValueError, "test", "val", **large)
refused(ValueError, "img (Image), labels (ClassLabel)", dataset_config="large")
refused(ValueError, "--image_column", **{**large, "image_column": "labels"})
refused(ValueError, "--label_column", label_column="kind", **large)
unlabelled = ImageViews(read(**large), make_processor(8))
assert unlabelled.labels.tolist() == [-1] * 5
views = ImageViews(read("test", label_column="labels", **large), make_processor(8))
assert views.__getitems__([0, 1, 2])["label"].tolist() == [0, 1, 0]
assert views.class_names == ["cat", "dog"]
words = ImageViews(read("test", label_column="words", **large), make_processor(8))
assert words.labels.tolist() == [0, 1, 0] and words.class_names == ["ant", "zebra"]
"""


def client(hub, folder, *command, check=True):
    """A program that runs in a folder and reaches no other Hub."""
    environment = {**hub.environment(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def hub():
    with hub_server() as hub:
        yield hub


@pytest.mark.slow
def test_a_published_model_is_loaded_by_its_card(hub, teacher, tmp_path):
    folder = saved_model("classification", teacher, tmp_path / "models" / "raptor_k2")
    make_processor(8).save_pretrained(folder)
    (folder / "run.json").write_text('{"output_dir": "/home/somebody"}')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"unfinished")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model_q4f16.onnx").write_bytes(b"a graph")
    (folder / "mine.py").write_text("notes")
    (tmp_path / "results").mkdir()
    for number, row in enumerate(results_of("classification")):
        row["dataset"] = "somebody/leaves"
        (tmp_path / "results" / f"{number}.json").write_text(json.dumps(row))
    command = [PUBLISH, "--model", folder, "--results", tmp_path / "results"]
    command += ["--repo_id", "me/raptor"]
    hub.repositories["models/me/raptor"] = repo = Repository()
    old = ("pytorch_model.bin", "README.md", "a.png", "onnx/model.onnx")
    repo.add(dict.fromkeys(old, b"old"))
    client(hub, tmp_path, *command, "--dry_run")
    refused = client(hub, tmp_path, *command, "--private", check=False)
    assert "exists and is public; nothing was uploaded" in refused.stderr
    assert len(hub.commits("me/raptor")) == 2

    done = client(hub, tmp_path, *command)
    first, last = hub.commits("me/raptor")[2:]
    assert f"revision {first}" in done.stdout and TOKEN not in done.stdout + done.stderr
    # the model byte for byte, its code, and nothing of the run
    pushed = hub.files("me/raptor")
    code = {"configuration_raptor.py", "modeling_raptor.py", "modeling_raptor_heads.py"}
    data = {"config.json", "model.safetensors", "preprocessor_config.json", "training.json"}
    data |= {"onnx/model_q4f16.onnx", ".eval_results/probe.yaml"}
    assert set(pushed) - {".gitattributes"} == code | data | {"README.md", "a.png"}
    for name in code | data:
        assert pushed[name] == (folder / name).read_bytes(), name
    assert str(tmp_path).encode() not in b"".join(pushed.values())
    [entry] = parse_eval_result_entries(yaml.safe_load(pushed[".eval_results/probe.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("somebody/leaves", "default", 0.8438)
    # the old card stays until the new one can name the commit
    assert hub.files("me/raptor", first)["README.md"] == b"old"
    snippet = pushed["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert f'name, revision = "me/raptor", "{first}"' in snippet
    done = client(hub, tmp_path, "-c", WITHOUT_THE_PACKAGE + snippet)
    label, states = done.stdout.split()
    assert label in ("LABEL_0", "LABEL_1", "LABEL_2") and states == "7"


@pytest.mark.slow
def test_published_activations_are_read_without_this_package(hub, store, tmp_path):
    hub.repositories["datasets/me/states"] = repo = Repository()
    repo.add({"data-00009-of-00010.arrow": b"old"})
    client(hub, tmp_path, PUBLISH, "--activations", store, "--repo_id", "me/states")
    commit = hub.commits("me/states", "dataset")[-1]
    files = hub.files("me/states", repo_type="dataset")
    own = {file.name: file.read_bytes() for file in store.iterdir() if file.name != ".lock"}
    assert files == own  # without the old shard
    code = WITHOUT_THE_PACKAGE + READ_A_DATASET
    assert client(hub, tmp_path, "-c", code, commit, store).stdout.split()[-1] == "10"


@pytest.mark.slow
def test_a_page_is_published_with_its_model(hub, tmp_path):
    for name in publish.SHOWN:
        (tmp_path / "raptor" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raptor" / name).write_bytes(name.encode())
    command = [PUBLISH, "--space", tmp_path / "raptor", "--repo_id", "me/page"]
    if not (publish.PAGE / publish.PAGE_FILES[-1]).is_file():
        assert "npm install" in client(hub, tmp_path, *command, check=False).stderr
        return
    client(hub, tmp_path, *command)
    files = hub.files("me/page", repo_type="space")
    assert files["model/onnx/states_q4f16.onnx"] == b"onnx/states_q4f16.onnx"
    assert b"sdk: static" in files["README.md"] and set(files) - {".gitattributes"} == {
        "README.md", *publish.PAGE_FILES, *(f"model/{name}" for name in publish.SHOWN)
    }  # fmt: skip
    # all that the page asks for
    page = files["index.html"].decode()
    for name in re.findall(r'(?:src|href)="([\w.]+)"|"\./([^"]+)"', page):
        assert "".join(name) in files


def test_damaged_activations_are_not_published(store):
    shard = sorted(store.glob("data-*.arrow"))[1]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=shard.name):
        publish_activations(store, "me/states")


@pytest.mark.slow
def test_images_of_any_columns_and_configuration_are_read(hub, tmp_path):
    client(hub, tmp_path, "-c", PUBLISH_IMAGES)
    client(hub, tmp_path, "-c", READ_IMAGES)
