"""Write ONNX files of a model beside its weights, for onnxruntime and transformers.js.

python model_cards/export.py --model outputs/digits/seed_0/classification/models/raptor_k3

`onnx/model.onnx`, `model_fp16.onnx`, `model_int8.onnx` and `model_q4f16.onnx` are the names that
transformers.js looks for. Each file is run and compared with PyTorch; `export.json` has the bytes
and the differences, which the model card shows. Needs the extra `onnx`.
"""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_ir import serde
from onnx_ir.passes import common
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript.optimizer import optimize
from torch import nn
from torch.export import Dim
from transformers import AutoConfig, PreTrainedModel

from raptor_hf import load_raptorized
from raptor_hf.configuration_raptor import RaptorConfig, teacher_family
from raptor_hf.data import ImageViews, choose_images, load_images
from raptor_hf.modeling_raptor import pair
from raptor_hf.modeling_raptor_heads import AUTO_CLASSES, pool_tokens
from raptor_hf.runs.arguments import parse_arguments
from raptor_hf.runs.files import folder_digest, public_name, read_json, write_json
from raptor_hf.runs.processes import run_program
from raptor_hf.teachers import load_processor
from raptor_hf.teachers.trunks import RaptorTrunk

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4f16": "_q4f16"}
NUM_IMAGES, BATCH = 32, 8
FOLDED = 2**24  # largest number of values of a constant that is computed beforehand


@dataclass(kw_only=True)
class Arguments:
    """A model, the files to write, and the images to compare them on."""

    model: str = field(metadata={"help": "folder of a Raptor, with a head or without"})
    dtypes: list[str] = field(
        default_factory=lambda: list(SUFFIXES),
        metadata={"help": "the files to write", "choices": list(SUFFIXES)},
    )
    states: bool = field(
        default=False,
        metadata={"help": "write states*.onnx instead: the states, and classes, of all layers"},
    )
    dataset: str = field(
        default="digits", metadata={"help": "images to compare on: digits, a folder, a Hub id"}
    )
    split: str = field(default="test", metadata={"help": "of the dataset"})


class Product(nn.Module):
    """A linear layer whose weight is stored as it is multiplied, (in, out).

    `nn.Linear` would be a transpose in every application of a block, which hides the weight from
    onnxruntime's quantisers.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.T.contiguous())
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (…, in) to (…, out)."""
        product = inputs @ self.weight
        return product if self.bias is None else product + self.bias


class AllStates(nn.Module):
    """The states of all layers of a Raptor and, with a classifier, their classes."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `hidden_states` (B, L + 1, N, D) and `logits` (B, L + 1, labels)."""
        raptor, config = self.model.base_model, self.model.config
        states = raptor(pixel_values, output_hidden_states=True).hidden_states
        outputs = {"hidden_states": torch.stack(states, dim=1)}
        if isinstance(self.model, AUTO_CLASSES["AutoModelForImageClassification"]):
            pooled = [pool_tokens(raptor.norm(state), config) for state in states]
            outputs["logits"] = self.model.classifier(torch.stack(pooled, dim=1))
        return outputs


def load_model(folder: Path) -> tuple[PreTrainedModel, RaptorConfig]:
    """Load a Raptor, or a model with blocks in the place of its layers, and the blocks' settings.

    Raises:
        ValueError: another model.
    """
    if (folder / "raptorized.json").is_file():
        model = load_raptorized(folder)
        [config] = [part.config for part in model.modules() if isinstance(part, RaptorTrunk)]
        return model, config
    config = AutoConfig.from_pretrained(folder)
    classes = {model_class.__name__: model_class for model_class in AUTO_CLASSES.values()}
    name = (config.architectures or [""])[0]
    if name not in classes:
        raise ValueError(f"{folder} holds a {name or config.model_type}; give a Raptor's folder.")
    model = classes[name].from_pretrained(folder, dtype=torch.float32)
    return model, model.config


def export(model: nn.Module, config: RaptorConfig, names: list[str]) -> onnx.ModelProto:
    """Export a model with outputs of these names; its linear layers are replaced in place.

    It takes any number of images, of any size from two patches a side where the family allows it.
    """
    for name, part in list(model.named_modules()):
        if type(part) is nn.Linear:
            model.set_submodule(name, Product(part))

    # a symbol for a size needs an example of another size than the teacher's own
    shape, size = {0: Dim("batch")}, pair(config.image_size)
    if takes_sizes(model, config):
        sides = pair(config.patch_size)
        shape |= {2: sides[0] * Dim("rows", min=2), 3: sides[1] * Dim("columns", min=2)}
        size = (6 * sides[0], 5 * sides[1])
    images = torch.zeros(2, config.num_channels, *size)
    program = torch.export.export(
        model, (images,), dynamic_shapes={"pixel_values": shape}, strict=True
    )

    # the depth scaling becomes constants, and shared constants are stored once
    exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names).model
    optimize(exported, input_size_limit=FOLDED, output_size_limit=FOLDED)
    common.CommonSubexpressionEliminationPass()(exported)
    common.DeduplicateInitializersPass()(exported)
    common.ClearMetadataAndDocStringPass()(exported)
    return serde.serialize_model(exported)


def takes_sizes(model: nn.Module, config: RaptorConfig) -> bool:
    """Return whether a model takes images of other sizes than its teacher was made for."""
    resizing = teacher_family(config.teacher_config).resizing
    if config.teacher_config.model_type == "radio":  # its code asks which side is longer
        return False
    raptorized = any(isinstance(part, RaptorTrunk) for part in model.modules())
    return resizing == "always" or (resizing == "asked" and not raptorized)


def convert(model: onnx.ModelProto, dtype: str, file: Path) -> None:
    """Write a float32 model in another precision, by onnxruntime's own converters.

    Matrices alone are rounded: int8 per channel, 4 bits in groups of 32 with a float16 factor.
    """
    if dtype == "int8":
        options = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
        quantize_dynamic(model, file, weight_type=QuantType.QInt8, **options)
        return
    if dtype == "q4f16":
        quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
        quantizer.process()
        model = quantizer.model.model
        # a shared matrix was appended once for each of its applications
        constants = {constant.name: constant for constant in model.graph.initializer}
        del model.graph.initializer[:]
        model.graph.initializer.extend(constants.values())
    if dtype in ("fp16", "q4f16"):
        model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, file)


def open_session(file: Path, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """Load a file, to run on so many threads of the CPU; 0: onnxruntime chooses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run_onnx(file: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the outputs of a file for images (B, C, H, W), by their names."""
    session = open_session(file)
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(None, {"pixel_values": part.numpy()}) for part in images.split(BATCH)]
    return {
        name: torch.from_numpy(np.concatenate(values))
        for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


@torch.no_grad()
def run_torch(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the outputs of a model for images (B, C, H, W), by their names.

    Raises:
        ValueError: a model that needs more than images, or whose outputs are no tensors.
    """
    try:
        parts = [dict(model(pixel_values=part)) for part in images.split(BATCH)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"A {type(model).__name__} needs more than images: {error}") from error
    if not all(isinstance(value, torch.Tensor) for value in parts[0].values()):
        raise ValueError(f"The outputs of a {type(model).__name__} are no tensors: {[*parts[0]]}.")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return R² of the first output, around the mean of each channel, and the worst cosine of an
    image's last output: `pooler_output`, the cls token, or `logits`.
    """
    [*_, last], [first, *_] = theirs, theirs
    pairs = (outputs[last].double().flatten(1) for outputs in (ours, theirs))
    cosines = nn.functional.cosine_similarity(*pairs)
    # channels are the last axis, but of maps: logits (B, labels, h, w), depth (B, H, W)
    found, expected = ours[first].double(), theirs[first].double()
    if first == "predicted_depth":
        found, expected = found[..., None], expected[..., None]
    elif first == "logits" and expected.ndim == 4:
        found, expected = found.movedim(1, -1), expected.movedim(1, -1)
    found, expected = found.flatten(0, -2), expected.flatten(0, -2)
    r2 = 1 - (found - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    return {"r2": round(float(r2), 5), "worst_cosine": round(float(cosines.min()), 5)}


def write_file(
    graph: onnx.ModelProto,
    dtype: str,
    file: Path,
    images: torch.Tensor,
    expected: dict[str, torch.Tensor],
) -> dict:
    """Convert a graph, compare it with PyTorch's outputs, and only then give it its name.

    Returns:
        Its bytes and its losses, as from `compare`.

    Raises:
        RuntimeError: float32 is not equal, or another precision is no better than a mean.
    """
    unproved = file.with_suffix(".unproved")
    convert(copy.deepcopy(graph), dtype, unproved)
    losses = compare(run_onnx(unproved, images), expected)
    # nor may it be no number
    if not losses["r2"] > (0.9999 if dtype == "fp32" else 0):
        unproved.unlink()
        raise RuntimeError(f"{file.name} does not follow PyTorch and was deleted: {losses}.")
    unproved.replace(file)
    return {"bytes": file.stat().st_size, **losses}


def kept_files(folder: Path, facts: dict) -> dict[str, dict]:
    """Return what `export.json` says of files that these facts hold for; delete all others."""
    account, files = {}, {}
    if (folder / "export.json").is_file():
        account = read_json(folder / "export.json")
        files = account.pop("files")
    present = [f"onnx/{file.name}" for file in sorted((folder / "onnx").glob("*.onnx"))]
    kept = [name for name in present if account == facts and name in files]
    for name in present:
        if name not in kept:
            (folder / name).unlink()
    return {name: files[name] for name in kept}


def main(argv: list[str] | None = None) -> None:
    """Export once, write every file, compare it, and print what it loses."""
    (arguments,) = parse_arguments(Arguments, argv=argv)
    folder = Path(arguments.model)
    model, config = load_model(folder)
    model.config.output_hidden_states = False
    model = model.eval().requires_grad_(False)
    if arguments.states:
        if config is not model.config:
            raise ValueError("--states is for Raptors, not for models with blocks within.")
        model = AllStates(model)

    # what PyTorch computes
    dataset = load_images(arguments.dataset, arguments.split)
    rows = choose_images(len(dataset), min(NUM_IMAGES, len(dataset)), seed=0)
    images = ImageViews(dataset, load_processor(folder)).__getitems__(rows)["pixel_values"]
    expected = run_torch(model, images)

    # files that were made of other weights, or compared on other images, go
    facts = {"weights": folder_digest(folder), "dataset": public_name(arguments.dataset)}
    facts |= {"split": arguments.split, "num_images": len(images), "size": list(images.shape[-2:])}
    facts["onnxruntime"] = onnxruntime.__version__
    (folder / "onnx").mkdir(exist_ok=True)
    files = kept_files(folder, facts)

    # one graph for all files
    graph, stem = export(model, config, list(expected)), "states" if arguments.states else "model"
    for dtype in arguments.dtypes:
        name = f"onnx/{stem}{SUFFIXES[dtype]}.onnx"
        files[name] = write_file(graph, dtype, folder / name, images, expected)
        write_json(folder / "export.json", facts | {"files": files})
        losses = f"R² {files[name]['r2']}, cosine {files[name]['worst_cosine']}"
        print(f"{folder / name}: {files[name]['bytes'] / 1e6:.2f} MB, {losses}")


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime sets it to INFO
    run_program(main, alone=True)
