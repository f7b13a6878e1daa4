"""The atlas as a dataset: its rows, its card, and its way to the Hub and back."""

import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from evaluation.recurrence.hub import atlas_files
from evaluation.recurrence.page import write_page
from tests.hub_server import TOKEN, Repository, hub_server
from tests.programs import ROOT
from tests.recurrence.test_page import GAPS, TEMPLATE, made_map

READ = """
import datasets
atlas = datasets.load_dataset("me/atlas", split="train")
cut = next(cut for cut in atlas[0]["cuts"] if cut["method"] == "maxcut" and cut["k"] == 3)
print(len(atlas), atlas[0]["name"], cut["phases"], len(atlas[1]["distance"]))
"""


@pytest.fixture
def folder(tmp_path):
    """Two maps and their page."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    for one in (made_map("a | b", gaps=GAPS), made_map("deep", 16, ["maxcut"])):
        (folder / f"{one['num_layers']}.json").write_text(json.dumps(one))
    write_page(folder, TEMPLATE)
    return folder


def test_a_row_a_teacher_and_a_card_with_the_tables(folder, tmp_path):
    files = atlas_files(folder, "me/atlas")
    assert set(files) == {
        "README.md", "atlas.html", "data/train-00000-of-00001.parquet", "maps/a_b.json",
        "maps/deep.json",
    }  # fmt: skip
    table = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == ["a | b", "deep"]
    assert [len(row["cuts"]) for row in rows] == [6, 3]
    none = [cut for cut in rows[0]["cuts"] if cut["phases"] is None]
    assert [(cut["method"], cut["k"], cut["no_partition"]) for cut in none] == [
        ("recursive", 3, 1),
        ("recursive", 6, 1),
    ]
    assert rows[1]["speed"][0]["name"] == "patches" and len(rows[1]["speed"][0]["std"]) == 16
    assert len(rows[1]["variance"][0]["mean"]) == 17
    assert json.loads(files["maps/a_b.json"])["gaps"] == GAPS
    card = files["README.md"].decode()
    assert "| a \\| b | vit | 6 |" in card and "| teacher | k = 2 | k = 3 | k = 6 |" in card
    assert "maxcut, exact max-cut of runs" in card and 'load_dataset("me/atlas"' in card
    assert files == atlas_files(folder, "me/atlas")
    with pytest.raises(ValueError, match="holds no phase map: make some"):
        atlas_files(tmp_path, "me/atlas")


def client(hub, folder, *command, check=True):
    """A program that knows only this Hub."""
    environment = {**hub.environment(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_atlas_goes_to_the_hub_and_is_read_by_anybody(folder, tmp_path):
    publish = ["-m", "evaluation.recurrence.atlas", "--output_dir", folder, "--push_to_hub"]
    with hub_server() as hub:
        hub.repositories["datasets/me/atlas"] = Repository()
        refused = client(hub, tmp_path, *publish, "me/atlas", "--private", check=False)
        assert "exists and is public; nothing was uploaded" in refused.stderr
        done = client(hub, tmp_path, *publish, "me/atlas")
        first, last = hub.commits("me/atlas", "dataset")
        assert f"dataset: me/atlas, revision {last}" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
        files = hub.files("me/atlas", repo_type="dataset")
        assert files == atlas_files(folder, "me/atlas")
        assert str(tmp_path).encode() not in b"".join(files.values())
        done = client(hub, tmp_path, "-c", READ)
        assert done.stdout.split("\n")[0] == "2 a | b [2, 2, 2] 16"
