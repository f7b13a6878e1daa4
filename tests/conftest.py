import os
import sys
import tempfile

# tests run on the CPU whatever the machine has, but for those marked gpu; workers of pytest-xdist
# do not see the command line, and are told
if os.environ.setdefault("TESTS_ON_GPU", str(int("gpu" in sys.argv))) == "0":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# read when huggingface_hub is imported: no network, and no cache but the tests' own
os.environ["HF_HUB_OFFLINE"] = "1"
# two workers share the cores, and the order of sums does not depend on how many there are
os.environ.setdefault("OMP_NUM_THREADS", "1")
HF_HOME = tempfile.TemporaryDirectory(prefix="raptor_hf_tests_")  # removed when the tests end
os.environ["HF_HOME"] = HF_HOME.name

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    Dinov2Config,
    Dinov2Model,
)

from raptor_hf.activations.writing import write_activations  # noqa: E402
from raptor_hf.data import ImageViews, make_processor  # noqa: E402
from tests.helpers import SIZES, FeatureDataset, tiny_teacher  # noqa: E402
from tests.programs import run  # noqa: E402


@pytest.fixture
def teacher():
    """A tiny random DINOv2 with two registers: 6 layers, 24 channels, 1 + 2 + 4 tokens."""
    return tiny_teacher()


@pytest.fixture
def plain_teacher():
    """The same without registers."""
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZES)).eval().requires_grad_(False)


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wide_images():
    """Two images of 2 × 3 patches."""
    return torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images():
    """Five random grey images with labels, in two views."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(5, 8, 8), dtype=np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"])
    )
    columns = {"image": list(pixels), "label": [0, 1, 0, 1, 0]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return ImageViews(dataset, make_processor(8), views=2, seed=3)


@pytest.fixture
def store(teacher, images, tmp_path):
    """Ten trajectories (5 images in 2 views) in five shards of two rows."""
    path = tmp_path / "store"
    path.mkdir()
    write_activations(teacher, images, path, batch_size=2, shard_megabytes=0)
    return path


def pytest_collection_modifyitems(items):
    """Give a file, and all tests of the digits line, to one worker of pytest-xdist each."""
    for item in items:
        group = "line" if "line" in item.fixturenames else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """The digits command of the README, with recipes of a few steps: (output folder, printed)."""
    out = tmp_path_factory.mktemp("line")
    command = ("bash", "training/reproduce.sh", "digits", "--full")
    return out, run(*command, OUT=str(out), RECIPES="tests/recipes").stdout


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(37, 5, generator=generator)
    return FeatureDataset(features, (features.sum(1) > 0).long())
