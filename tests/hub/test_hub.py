"""Publishing and reading over the Hub's own protocol, with the unmodified clients.

These read their environment when they are imported: so each is a process of its own, with a cache
of its own. Those that read a model or a dataset do so without this package.
"""

import hashlib
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file

from raptor_hf import RaptorForImageClassification, make_raptor, raptorize
from raptor_hf.data import make_processor
from tests.families import HOSTS
from tests.helpers import assert_same_outputs, randomised
from tests.hub_server import Blob, Repository, hub_server
from tests.programs import ROOT, WITHOUT_THE_PACKAGE

ATTEMPTS = 6  # huggingface_hub repeats an upload five times

REFUSED = """
import json, sys

def refused(kind, words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        assert type(error) is kind and words in str(error), repr(error)
    else:
        raise AssertionError(f"{function} of {arguments} {options} raised nothing")
"""

SAVE_OUTPUTS = """
import numpy, torch
from safetensors.torch import save_file

def save_outputs(path, processor, model, classifier, backbone):
    images = list(numpy.random.default_rng(0).integers(0, 256, (3, 20, 16, 3), dtype="uint8"))
    pixel_values = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model(pixel_values, output_hidden_states=True)
        [feature_map] = backbone(pixel_values).feature_maps
        found = {
            "pixel_values": pixel_values,
            "logits": classifier(pixel_values).logits,
            "feature_map": feature_map,
            "last_hidden_state": states.last_hidden_state,
            **{f"state_{layer}": state for layer, state in enumerate(states.hidden_states)},
        }
    save_file(found, path)
"""

PUBLISH_A_MODEL = """
from unittest import mock
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoImageProcessor
from raptor_hf import RaptorBackbone, RaptorForImageClassification

model = RaptorForImageClassification.from_pretrained("model")
processor = AutoImageProcessor.from_pretrained("model")
backbone = RaptorBackbone.from_pretrained("model")
save_outputs("published.safetensors", processor, model.raptor, model, backbone)
push = {"repo_id": "user/raptor", "private": True}
refused(HfHubHTTPError, "401 Unauthorized", model.push_to_hub, **push, token="hf_wrong")
with mock.patch("time.sleep"):  # spares the 24 seconds between the attempts
    refused(RuntimeError, "Error while uploading 'model.safetensors'", model.push_to_hub, **push)
    info = HfApi().model_info("user/raptor")
    commit = model.push_to_hub(**push).oid
facts = {"after_the_cut": [info.sha, info.siblings], "commit": commit}
print(json.dumps({**facts, "last_commit": processor.push_to_hub(**push).oid}))
"""

READ_A_MODEL = """
from transformers import (
    AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
)

repo_id, revision = sys.argv[1:]
load = AutoModel.from_pretrained
refused(OSError, "not a valid model identifier", load, "user/nothing")
refused(OSError, "not a valid git identifier", load, repo_id, revision="v9")
refused(OSError, "Invalid credentials", load, repo_id, token="hf_wrong")
refused(ValueError, "trust_remote_code=True", load, repo_id, trust_remote_code=False)
processor = AutoImageProcessor.from_pretrained(repo_id, revision=revision)
classes = AutoModel, AutoModelForImageClassification, AutoBackbone
trusted = {"trust_remote_code": True, "revision": revision}
models = [auto_class.from_pretrained(repo_id, **trusted) for auto_class in classes]
save_outputs("read.safetensors", processor, *models)
print(json.dumps([[type(model).__name__ for model in models], models[1].config.id2label]))
"""

PUBLISH_A_RAPTORIZED_MODEL = """
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification
import raptor_hf

model = AutoModelForImageClassification.from_pretrained("model")
model.save_pretrained("again")
model.save_pretrained("again", push_to_hub=True, repo_id="user/saved")
model.push_to_hub("user/pushed")
card = {"path_or_fileobj": b"mine", "path_in_repo": "README.md"}
HfApi().upload_file(repo_id="user/pushed", **card)
model.push_to_hub("user/pushed")
print("{}")
"""

PUBLISH_A_DATASET = """
from huggingface_hub import HfApi

HfApi().create_repo("user/states", repo_type="dataset")
options = {"folder_path": sys.argv[1], "repo_id": "user/states", "repo_type": "dataset"}
print(json.dumps(HfApi().upload_folder(**options).oid))
"""

READ_A_DATASET = """
import datasets

revision, store = sys.argv[1:]
wrong = datasets.exceptions.DatasetNotFoundError
refused(wrong, "doesn't exist", datasets.load_dataset, "user/nothing")
refused(wrong, "Revision 'v9'", datasets.load_dataset, "user/states", revision="v9")
published = datasets.load_from_disk(store)
read = datasets.load_dataset("user/states", split="train", revision=revision)
assert read.features == published.features, read.features
assert read.data.table.equals(published.data.table)
streamed = datasets.load_dataset("user/states", split="train", streaming=True)
assert streamed.features == published.features, streamed.features
assert list(streamed) == published.to_list()
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
print(json.dumps(None))
"""

READ_IMAGES = """
from raptor_hf.data import ImageViews, ReadingArguments, list_images, load_images, make_processor

pets, columns = "user/pets", {"image_column": "img"}

def read(split="train", **options):
    return load_images(pets, split, ReadingArguments(**options))

refused(ValueError, "small", read, **columns)  # the configurations are listed
refused(ValueError, "--dataset_config", read, dataset_config="huge", **columns)
refused(ValueError, "large", read, dataset_config="huge", **columns)
refused(ValueError, "test", read, "val", dataset_config="large", **columns)
refused(ValueError, "img (Image), labels (ClassLabel)", read, dataset_config="large")
refused(ValueError, "give --image_column", read, dataset_config="large", image_column="labels")
refused(FileNotFoundError, "no such dataset on the Hub", load_images, "user/nothing", "train")
large = {"dataset_config": "large", **columns}
refused(ValueError, "give --label_column", read, label_column="kind", **large)
unlabelled = ImageViews(read(**large), make_processor(8))
assert unlabelled.labels.tolist() == [-1] * 5 and unlabelled.classes == (None, 0)
views = ImageViews(read("test", label_column="labels", **large), make_processor(8))
assert views.__getitems__([0, 1, 2])["label"].tolist() == [0, 1, 0]
assert views.class_names == ["cat", "dog"]
words = ImageViews(read("test", label_column="words", **large), make_processor(8))
assert words.labels.tolist() == [0, 1, 0] and words.class_names == ["ant", "zebra"]
same = [list_images(pets, read("test", **large)).digest for _ in range(2)]
other = list_images(pets, read(**large)).digest
assert same[0] == same[1] != other
print(json.dumps(same[0]))
"""

READ_FILES = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError,
)

api, file = HfApi(), ("user/secret", "config.json")
for read in hf_hub_download, snapshot_download:
    arguments = file if read is hf_hub_download else file[:1]
    refused(HfHubHTTPError, "Invalid credentials", read, *arguments, token="hf_wrong")
    refused(RepositoryNotFoundError, "401", read, *arguments, token=False)
    refused(RepositoryNotFoundError, "404", read, "user/nothing", *arguments[1:])
    refused(RevisionNotFoundError, "Invalid rev id: v9", read, *arguments, revision="v9")
refused(RemoteEntryNotFoundError, "Entry Not Found", hf_hub_download, "user/secret", "nothing")
push = {"path_or_fileobj": b"changed", "path_in_repo": "config.json"}
for repo_id in "user/secret", "user/nothing":
    for kind, token in (HfHubHTTPError, "hf_wrong"), (RepositoryNotFoundError, False):
        refused(kind, "401", api.upload_file, **push, repo_id=repo_id, token=token)
refused(RepositoryNotFoundError, "404", api.upload_file, **push, repo_id="user/nothing")
refused(HfHubHTTPError, "401", api.create_repo, "user/nothing", token="hf_wrong")
print(json.dumps(open(hf_hub_download(*file)).read()))
"""

READ_HOSTILE_FILES = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

for repo_id, path in json.loads(sys.argv[1]).items():
    assert HfApi().list_repo_files(repo_id) == [path]
    for place in {}, {"local_dir": f"local/{repo_id}"}:
        refused(ValueError, "Invalid filename", hf_hub_download, repo_id, path, **place)
        refused(ValueError, "Invalid filename", snapshot_download, repo_id, **place)
print("{}")
"""


def client(hub, folder, code, *arguments, **variables):
    """What a program says in its last line, in JSON. It runs in a folder, and knows no other Hub.

    Its standard input is empty: transformers would ask there whether it may run a model's code.
    """
    done = subprocess.run(
        [sys.executable, "-c", REFUSED + code, *map(str, arguments)], cwd=folder,
        env={**hub.environment(folder), **variables}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub():
    with hub_server() as hub:
        yield hub


def stored(hub, repo_id, path, private=False):
    """Put a file into a new repository, unchecked."""
    repo = hub.repositories[f"models/{repo_id}"] = Repository(f"models/{repo_id}", private)
    repo.add("main", "a file", {path: Blob(b"kept", lfs=False)})
    return hub.commits(repo_id)


@pytest.mark.slow
def test_a_model_is_published_despite_cuts_and_read_without_this_package(hub, teacher, tmp_path):
    config = make_raptor(teacher, [3, 2, 1]).config
    config.id2label = {0: "even", 1: "odd", 2: "neither"}
    randomised(RaptorForImageClassification(config)).save_pretrained(tmp_path / "model")
    make_processor(8).save_pretrained(tmp_path / "model")

    hub.cut_uploads = ATTEMPTS + 1  # the one left over meets the next push, which tries again
    code = SAVE_OUTPUTS + PUBLISH_A_MODEL
    facts = client(hub, tmp_path, code, PYTHONPATH=str(ROOT))
    assert hub.cut_uploads == 0
    empty, *commits = hub.commits("user/raptor")
    assert facts["after_the_cut"] == [empty, []]
    assert commits == [facts["commit"], facts["last_commit"]]
    files = hub.files("user/raptor", facts["commit"])
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert hub.files("user/raptor").keys() - files.keys() == {"preprocessor_config.json"}

    code = WITHOUT_THE_PACKAGE + SAVE_OUTPUTS + READ_A_MODEL
    classes, labels = client(hub, tmp_path, code, "user/raptor", facts["last_commit"])
    assert classes == ["RaptorModel", "RaptorForImageClassification", "RaptorBackbone"]
    assert labels == {"0": "even", "1": "odd", "2": "neither"}
    published = load_file(tmp_path / "published.safetensors")
    read = load_file(tmp_path / "read.safetensors")
    assert published.keys() == read.keys() and "state_6" in read
    assert torch.equal(read["pixel_values"], published["pixel_values"])
    assert_same_outputs(read, published)


def test_a_raptorized_model_is_pushed_with_its_code_and_card(hub, tmp_path):
    model, _ = HOSTS["ViTForImageClassification"]()
    raptorize(model, [2, 1]).save_pretrained(tmp_path / "model")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert {"modeling_raptorized.py", "README.md"} < set(expected)
    client(hub, tmp_path, PUBLISH_A_RAPTORIZED_MODEL, PYTHONPATH=str(ROOT))
    _, first, *_, last = hub.commits("user/pushed")
    for repo_id, revision in (("user/saved", "main"), ("user/pushed", first)):
        files = hub.files(repo_id, revision)
        assert files.keys() - {".gitattributes"} == expected.keys()
        for name in set(expected) - {"config.json"}:
            assert files[name] == expected[name], name
    assert hub.files("user/pushed", last)["README.md"].endswith(b"mine")


def test_an_activation_dataset_is_published_and_read_without_this_package(hub, store, tmp_path):
    commit = client(hub, tmp_path, PUBLISH_A_DATASET, store)
    assert hub.commits("user/states", "dataset")[1:] == [commit]
    files = hub.files("user/states", repo_type="dataset")
    assert files == {path.name: path.read_bytes() for path in store.iterdir()}
    assert client(hub, tmp_path, WITHOUT_THE_PACKAGE + READ_A_DATASET, commit, store) == 10


def test_images_of_any_columns_and_configuration_are_read(hub, tmp_path):
    client(hub, tmp_path, PUBLISH_IMAGES)
    first = client(hub, tmp_path, READ_IMAGES, PYTHONPATH=str(ROOT))
    assert client(hub, tmp_path, READ_IMAGES, PYTHONPATH=str(ROOT)) == first


def test_what_is_forbidden_or_missing_is_named_and_changes_nothing(hub, tmp_path):
    commits = stored(hub, "user/secret", "config.json", private=True)
    assert client(hub, tmp_path, READ_FILES) == "kept"
    assert hub.commits("user/secret") == commits and len(hub.repositories) == 1


def test_the_files_of_a_hostile_repository_stay_inside_the_folder(hub, tmp_path):
    paths = ["../evil", "a/../../../evil", f"{tmp_path}/evil", "..\\evil", "C:\\evil"]
    hostile = {f"user/hostile{index}": path for index, path in enumerate(paths)}
    for repo_id, path in hostile.items():
        stored(hub, repo_id, path)
    client(hub, tmp_path, READ_HOSTILE_FILES, json.dumps(hostile))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "evil" in path.name]


def send(hub, method, path, body, **headers):
    """The status of the answer to a request as no client would send it."""
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def commit_of(*operations, **header):
    lines = [{"key": "header", "value": {"summary": "a commit", **header}}, *operations]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_the_server_makes_a_whole_commit_or_none(hub):
    before = stored(hub, "user/model", "config.json")
    oid, token = hashlib.sha256(b"weights").hexdigest(), {"Authorization": f"Bearer {hub.token}"}
    file = {"key": "file", "value": {"path": "a.txt", "content": "YQ=="}}
    large = {"key": "lfsFile", "value": {"path": "b.bin", "oid": oid, "size": 7}}
    api = "/api/models/user/model"

    def push(*operations, branch="main", headers=token, **header):
        body = commit_of(*operations, **header)
        return send(hub, "POST", f"{api}/commit/{branch}", body, **headers)

    assert push(file, large) == 400  # nobody has uploaded it
    place = f"{api}/lfs/{oid}/7?key={hub.upload_key}"
    assert send(hub, "PUT", place, b"Weights") == send(hub, "PUT", place, b"weights!") == 400
    assert push(file, large) == 400
    assert send(hub, "PUT", place.partition("?")[0], b"weights") == 401
    assert send(hub, "PUT", place, b"weights") == 200
    assert push(file, {**large, "value": {**large["value"], "size": 8}}) == 400
    for path in "../evil", "a/../../evil", "/evil", "a//b", ".", "", "..\\evil", "C:evil":
        assert push(file, {"key": "file", "value": {"path": path, "content": ""}}) == 400
    for key, status in {"deletedFile": 404, "deletedFolder": 404, "rename": 400}.items():
        assert push(file, {"key": key, "value": {"path": "nothing"}}) == status
    assert push(file, {"key": "file"}) == push(file, {}) == push(file, None) == 400
    assert push(file, branch="v9") == 404
    assert push(file, branch=before[-1]) == push(file, parentCommit=before[0]) == 412
    assert push(file, headers={}) == push(file, headers={"Authorization": "x"}) == 401
    sent, meant = commit_of(file), commit_of(file, large)  # what arrives would do as a commit
    head = f"POST {api}/commit/main HTTP/1.1\r\nAuthorization: {token['Authorization']}\r\n"
    with socket.create_connection(("127.0.0.1", hub.server_port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(meant)}\r\n\r\n".encode() + sent)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert hub.commits("user/model") == before
    assert push(file, large, parentCommit=before[-1]) == 200
    assert hub.files("user/model") == {"config.json": b"kept", "a.txt": b"a", "b.bin": b"weights"}
    assert hub.files("user/model", before[-1]) == {"config.json": b"kept"}
