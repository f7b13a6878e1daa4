"""What several test files share: tiny models, data, a training loop, comparisons.

Weights and files are compared exactly, outputs of kernels to a tolerance.
"""

import copy
import dataclasses
import multiprocessing
import os

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf import RaptorConfig, make_raptor
from raptor_hf.configuration_raptor import TokenLayout
from raptor_hf.data import ImageViews, make_processor
from raptor_hf.loop.arguments import LoopArguments
from raptor_hf.loop.scalars import StepResult
from raptor_hf.tasks.heads import attach_head

# a process that has imported everything, and forks in a moment
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["raptor_hf.activations.writing"])


def assert_same_outputs(actual, expected, tolerance=3e-6):
    """Compare what kernels computed: tensors, or tuples, lists and dicts of them (ModelOutputs).

    A processor's library chooses a kernel by address and shape, and each kernel rounds in its own
    way. Weights that are mapped from a file lie at other addresses than weights that torch
    allocated, so equal weights may give outputs that differ in the last bits. The tolerance is a
    share of the largest absolute value of each expected tensor: errors of 1e-7 in every product
    grow to 1e-6 in the logits of a small model. Whole numbers must be equal.
    """
    if isinstance(expected, torch.Tensor):
        largest = expected.detach().abs().max().item() if expected.is_floating_point() else 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_outputs(actual[name], value, tolerance)
    else:
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_outputs(one, other, tolerance)


LAYOUT = TokenLayout(1, 2)


def randomised(module):
    """The module with every parameter drawn anew: none is left where it could hide a mistake."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def result(model, task, seed, metrics, phases=None, parameters=1200):
    facts = {"model": model, "task": task, "seed": seed, "metrics": metrics, "phases": phases}
    facts |= {"block_parameters": parameters, "dataset": "digits", "split": "test"}
    return facts | {"num_images": 360, "environment": {}}


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "layerscale_value": 0.5,
}


def tiny_teacher():
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2)
    return Dinov2WithRegistersModel(config).eval().requires_grad_(False)


def make(model_class, teacher, **fields):
    config = RaptorConfig(
        teacher_config=copy.deepcopy(teacher.config), phases=[4, 2], depth_bins=5, **fields
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    for block in model.base_model.blocks:
        randomised(block)
    return model


def tensors(outputs):
    """All tensors of an output, by the name of their field."""
    return {
        f"{name}.{index}": tensor
        for name, field in outputs.items()
        for index, tensor in enumerate(field if isinstance(field, tuple) else (field,))
    }


class FeatureDataset(Dataset):
    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, rows):
        return {"features": self.features[rows], "label": self.labels[rows]}


def arguments(path, **changes):
    values = {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "log_every": 2,
    }
    values |= {"checkpoint_every": 5, "report_to": "none", "output_dir": str(path)}
    return LoopArguments(**(values | changes))


def noisy_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 2))


def compute_loss(module, batch, progress):
    loss = nn.functional.cross_entropy(module(batch["features"]), batch["label"])
    return StepResult(loss, {"progress": torch.tensor(progress)})


def untimed(line):
    """A line of the log without what depends on the clock."""
    return {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}


class Killed(Exception):
    pass


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def noise(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def grey_images(number, *, size=8):
    """Random images of size × size pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(number, size, size), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    columns = {"image": list(pixels), "label": [0] * number}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return ImageViews(dataset, make_processor(size))


def save_models(folder):
    """A teacher, a Raptor with a head of ten classes, the bare Raptor, and a head file."""
    teacher = tiny_teacher()
    raptor = tiny_raptor(teacher)
    models = {
        "teacher": teacher,
        "raptor": attach_head(raptor, tiny_head(), NAMES),
        "bare_raptor": raptor,
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        make_processor(8).save_pretrained(folder / name)
    save_file(tiny_head().state_dict(), folder / "head.safetensors")
    return folder


NAMES = [f"kind {n}" for n in range(10)]


def tiny_raptor(teacher):
    torch.manual_seed(0)
    raptor = make_raptor(teacher, [4, 2])
    randomised(raptor.blocks)
    return raptor.eval()


def tiny_head():
    torch.manual_seed(1)
    return nn.Linear(48, 10).requires_grad_(False)


def build_arguments(values: dict, *parts: type) -> tuple:
    """Make an instance of every dataclass from one flat dict, as `parse_arguments` from flags.

    Raises:
        TypeError: a name that no dataclass has.
    """
    rest, built = dict(values), []
    for part in parts:
        names = [field.name for field in dataclasses.fields(part) if field.name in rest]
        built.append(part(**{name: rest.pop(name) for name in names}))
    if rest:
        raise TypeError(f"No argument is called {', '.join(sorted(rest))}.")
    return tuple(built)
