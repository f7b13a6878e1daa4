"""What bytes buy: teacher, Raptors and a shallow ViT in few bits, on the same held-out images.

The bytes are counted: matrices of layers or blocks in their bits with a float16 scale for every 32
inputs, everything else in 16 bits. R² is that of `RSquared`. Of every figure the file has the
interval that 95 % of 1,000 bootstrap draws of the held-out images fall into; the models, and what
their classifiers learned from, stay as they are.
"""

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedModel

from evaluation.plotting import line_style
from raptor_hf import make_raptor
from raptor_hf.activations import open_source
from raptor_hf.configuration_raptor import phase_spans, teacher_family, token_layout
from raptor_hf.data import ImageViews, batches, choose_images, load_images
from raptor_hf.distillation import chain_of, train_chains
from raptor_hf.distillation.arguments import parse_token_weights
from raptor_hf.distillation.compute import application_flops
from raptor_hf.distillation.provenance import training_facts
from raptor_hf.distillation.rounding import (
    GROUP,
    gptq,
    product_layers,
    record_inputs,
    round_weight,
    unpack_weight,
)
from raptor_hf.dynamics.measures import directions
from raptor_hf.loop import remove_checkpoints
from raptor_hf.modeling_raptor_heads import pool_tokens
from raptor_hf.reports.figures import make_figure
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.teachers import load_backbone, load_processor, trajectory
from raptor_hf.teachers.layers import config_for_teacher
from raptor_hf.teachers.states import final_norm
from training import distill_raptor

_CLIPPING = np.linspace(1, 0.6, 9)  # shares of the largest value of a group that are tried
_NEIGHBOURS, _DRAWS, _BATCH = 10, 1000, 32
# 1 − R² and its label
_TICKS = {
    1: "≤ 0", 0.3: ".7", 0.1: ".9", 0.03: ".97", 0.01: ".99", 0.003: ".997", 1e-3: "≥ .999",
}  # fmt: skip


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a matrix to the nearest values; each group is clipped where its error is least."""
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(dim=2, keepdim=True)
    best, least = weight, torch.full_like(largest, torch.inf)
    for share in _CLIPPING:
        clipped = groups.clamp(-share * largest, share * largest).flatten(1)
        rounded = unpack_weight(*round_weight(clipped, bits))
        errors = (rounded.unflatten(1, (-1, GROUP)) - groups).square().sum(dim=2, keepdim=True)
        better = (errors < least).expand_as(groups).flatten(1)
        best, least = torch.where(better, rounded, best), torch.minimum(errors, least)
    return best


def rounded_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layers of a model's blocks or layers."""
    raptor = model.config.model_type == "raptor"
    layers = model.get_submodule("blocks" if raptor else teacher_family(model.config).layers)
    return product_layers(layers)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return what `rounded_layers` get of batches of images: xᵀx of each, see `record_inputs`."""
    with record_inputs(rounded_layers(model)) as squares:
        for pixels in images:
            trajectory(model, pixels)
    return list(squares.values())


@torch.no_grad()
def in_bits(
    model: PreTrainedModel, bits: int, method: str, inputs: Sequence[torch.Tensor] = ()
) -> tuple[PreTrainedModel, int]:
    """Return a model with matrices of so many bits and 16 for the rest, and the bytes of both.

    Args:
        method: `"nearest"`, `"GPTQ"`; `"learned"`: they are rounded already.
        inputs: of the layers, for GPTQ, see `inputs_of`.
    """
    model, size = copy.deepcopy(model), 0
    layers = rounded_layers(model) if bits < 16 else []

    # the matrices
    for number, layer in enumerate(layers):
        if method == "nearest":
            layer.weight.copy_(nearest(layer.weight, bits))
        if method == "GPTQ":
            layer.weight.copy_(gptq(layer.weight, inputs[number], bits))
        size += layer.weight.numel() * bits // 8 + 2 * layer.weight.numel() // GROUP

    # the rest
    matrices = {id(layer.weight) for layer in layers}
    for weight in model.parameters():
        if id(weight) not in matrices:
            weight.copy_(weight.half())
            size += 2 * weight.numel()
    return model, size


@torch.no_grad()
def run(
    model: PreTrainedModel, images: list[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield states (B, L + 1, N, D) and features [cls, mean of patches] (B, 2·D) after the norm."""
    for pixels in images:
        states = trajectory(model, pixels)
        yield states, pool_tokens(final_norm(model, states[:, -1]), model.config)


class Judge:
    """Compares models with a teacher on held-out images; classifiers learn from other images.

    Args:
        name: folder or Hub id of the teacher, which has a cls token.
        dataset: a name for `load_images`.
        numbers: of the images to learn from and of those held out, chosen at random; 0: all.
    """

    def __init__(
        self, name: str, dataset: str, resolution: list[int] | None, numbers: tuple[int, int]
    ):
        self.teacher, processor = load_backbone(name), load_processor(name, resolution)
        splits = ("train", "test" if dataset == "digits" else "val")
        self.images, self.classes = [], []
        for split, number in zip(splits, numbers, strict=True):
            images = load_images(dataset, split)
            chosen = choose_images(len(images), min(number or len(images), len(images)), 0)
            views = ImageViews(images, processor, image_ids=chosen)
            self.images.append([b["pixel_values"] for b in batches(views, _BATCH, None)])
            self.classes.append(views.labels[chosen].numpy())

        # the teacher's states, their squared deviations from the groups' means, its features
        states, self.own = map(torch.cat, zip(*run(self.teacher, self.images[1]), strict=True))
        self.states, self.num_tokens, self.width = states, states.shape[2], states.shape[3]
        self.totals = {"all": torch.zeros(states.shape[:2])}
        for name, tokens in token_layout(self.teacher.config).groups().items():
            group = states[:, :, tokens]
            deviations = group - group.mean(dim=(0, 2), keepdim=True)
            self.totals[name] = deviations.square().sum(dim=(2, 3))
            self.totals["all"] += self.totals[name]
        self.learned = torch.cat([features for _, features in run(self.teacher, self.images[0])])
        self.draws = np.random.default_rng(0).multinomial(
            len(states), np.full(len(states), 1 / len(states)), _DRAWS
        )

    def judge(self, model: PreTrainedModel) -> dict[str, list[float]]:
        """Return figures of a model, see `scores`; without all layers only the last is compared."""
        errors, tested = {"all": [], "cls": []}, []
        for (states, features), target in zip(
            run(model, self.images[1]), self.states.split(_BATCH), strict=True
        ):
            tested.append(features)
            if states.shape != target.shape:
                states, target = states[:, -1:], target[:, -1:]
            difference = (states - target).square().sum(dim=3)
            errors["all"].append(difference.sum(dim=2))
            errors["cls"].append(difference[:, :, 0])
        learned = torch.cat([features for _, features in run(model, self.images[0])])
        return self.scores({k: torch.cat(v) for k, v in errors.items()}, learned, torch.cat(tested))

    def constant(self) -> dict[str, list[float]]:
        """Return figures of the mean states and the mean features, whatever the image."""
        mean = self.own.mean(dim=0)
        return self.scores(self.totals, mean.expand_as(self.learned), mean.expand_as(self.own))

    def scores(
        self, errors: dict[str, torch.Tensor], learned: torch.Tensor, tested: torch.Tensor
    ) -> dict[str, list[float]]:
        """Return every figure with the ends of its interval.

        `r2`, `r2_cls`: means over the layers; `r2_last`; `cosine` of the last cls tokens, normed;
        accuracies: `knn`, 10 neighbours by cls tokens, and `linear`, ridge regression on the
        features; `recall`: share of the teacher's 10 nearest cls tokens of an index that the model
        finds there.

        Args:
            errors: squared, of all tokens and of cls, (n, L + 1), or (n, 1) of the last layer.
            learned, tested: features of the images to learn from and of those held out.
        """
        # R² of layers
        losses = {"r2_last": (errors["all"][:, -1:], self.totals["all"][:, -1:])}
        if errors["all"].shape[1] > 1:
            for name, group in (("r2", "all"), ("r2_cls", "cls")):
                losses[name] = (errors[group][:, 1:], self.totals[group][:, 1:])

        # shares of images
        cls = [directions(features[:, : self.width]) for features in (learned, tested, self.own)]
        hits = {"cosine": (cls[1] * cls[2]).sum(dim=1)}
        knn = KNeighborsClassifier(_NEIGHBOURS, metric="cosine").fit(cls[0], self.classes[0])
        ridge = RidgeClassifierCV(np.logspace(-1, 5, 7))
        linear = make_pipeline(StandardScaler(), ridge).fit(learned, self.classes[0])
        hits["knn"] = knn.predict(cls[1]) == self.classes[1]
        hits["linear"] = linear.predict(tested) == self.classes[1]
        index = directions(self.learned[:, : self.width])
        found, right = ((part @ index.T).topk(_NEIGHBOURS).indices for part in cls[1:])
        hits["recall"] = (found[:, :, None] == right[:, None]).any(dim=2).double().mean(dim=1)
        for name, values in hits.items():
            values = torch.as_tensor(values).double()[:, None]
            losses[name] = (1 - values, torch.ones_like(values))
        return {name: interval(*loss, self.draws) for name, loss in losses.items()}


def interval(errors: torch.Tensor, totals: torch.Tensor, draws: np.ndarray) -> list[float]:
    """Return the mean over columns of 1 − Σ errors / Σ totals, and the ends of its 95 % interval.

    Args:
        errors, totals: (n, columns), of every image.
        draws: (d, n), how often each image is drawn.
    """
    errors, totals = errors.double().numpy(), totals.double().numpy()
    drawn = 1 - ((draws @ errors) / (draws @ totals)).mean(axis=1)
    value = 1 - (errors.sum(axis=0) / totals.sum(axis=0)).mean()
    return [round(float(x), 5) for x in (value, *np.percentile(drawn, (2.5, 97.5)))]


def train_shallow(a: argparse.Namespace, teacher: PreTrainedModel, like: str) -> None:
    """Train a ViT of as many layers as a Raptor has blocks to make the last state alone.

    It starts as the last layer of every phase, and learns from as many images, by the longest stage
    in `training.json` of the Raptor. The result goes to `a.shallow`; an interrupted run goes on.
    """
    stages = training_facts(like)["stages"]
    stages = [stage for stage in stages if "spans" not in stage["arguments"]]  # of whole Raptors
    recipe = max(stages, key=lambda stage: stage["images"])["arguments"]
    recipe |= {"teacher": teacher.name_or_path, "phase_fraction": 0.0, "quantize": None}
    recipe |= {"objective": "autoregressive", "report_to": "none"}
    recipe |= {"output_dir": a.shallow, "activations": str(Path(a.line) / "activations")}
    if a.dataset:
        recipe |= {"activations": "online", "dataset": a.dataset, "views": 0}
    words = [f"--{name}={value}" for name, value in recipe.items() if value is not None]
    if a.resolution:
        words += ["--resolution", *map(str, a.resolution)]
    parts = parse_arguments(*distill_raptor.PARTS[1:], argv=words)
    source, images, _, crops, reading, objective, _, _, loop = parts

    # the layers, of a teacher of its own
    phases, small = load_backbone(like).config.phases, load_backbone(teacher.name_or_path)
    ends = [stop for _, stop in phase_spans(phases)]
    path = teacher_family(small.config).layers
    layers = small.get_submodule(path)
    small.set_submodule(path, nn.ModuleList(layers[end - 1] for end in ends))
    small.config.num_hidden_layers = len(ends)
    for name in ("_out_features", "_out_indices"):  # a backbone's maps of the whole teacher
        setattr(small.config, name, None)
    model = make_raptor(small, [1] * len(ends), depth_scaling=False)

    # the training
    states = open_source(source, images, crops, reading, teacher, [0, *ends])
    chains = [chain_of(model, parse_token_weights(objective.token_weights))]
    new_views = source.online and images.views == 0
    train_chains(chains, teacher, states, objective, loop, new_views=new_views, last_only=True)
    model.save_pretrained(a.shallow)
    remove_checkpoints(a.shallow)


def benchmark_fidelity(a: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for every model and number of bits, the constant first."""
    name = a.teacher or str(Path(a.line) / "teacher")
    judge = Judge(name, a.dataset or "digits", a.resolution, (a.train_images, a.test_images))
    folders = named_folders("--models", a.models)
    if a.shallow:
        if not (Path(a.shallow) / "model.safetensors").is_file():
            train_shallow(a, judge.teacher, next(iter(folders.values())))
        folders["shallow"] = a.shallow
    facts = {"bits": 0, "method": None, "bytes": 0, "multiply_adds": 0}
    yield {"model": "constant", **facts, **judge.constant()}

    for name in ("teacher", *folders):
        model = judge.teacher if name == "teacher" else load_backbone(folders[name])
        # its sizes in bits, and ways to them
        own = getattr(model.config, "weight_bits", None)
        few, methods = [4, 3], ["GPTQ"]
        if name == "teacher":
            few, methods = [4, 3, 2], ["GPTQ", "nearest"]
        ways = [(16, "nearest"), (8, "nearest"), *itertools.product(few, methods)]
        if own:
            ways = [(own, "learned")]
        inputs = [] if own else inputs_of(model, judge.images[0][:8])
        config = model.config
        if config.model_type != "raptor":
            config = config_for_teacher(model, [config.num_hidden_layers])
        work = config.num_hidden_layers * application_flops(config, judge.num_tokens) // 2
        for bits, method in ways:
            rounded, size = in_bits(model, bits, method, inputs)
            facts = {"bits": bits, "method": method, "bytes": size, "multiply_adds": work}
            row = {"model": name, **facts, **judge.judge(rounded)}
            print(f"{name}, {bits} bits, {method}: R² of the last layer {row['r2_last'][0]:.4f}")
            yield row


def draw(rows: list[dict], file: Path) -> None:
    """Draw R² of the last layer over the bytes: a point a row, and the frontier of the best."""
    figure, axis = make_figure(figsize=(6, 4.6))
    series, points = {}, []
    for row in rows:
        if not row["bytes"]:
            continue
        # logarithms of the bytes and of 1 − R², where small and large losses are told apart
        points.append((row["bytes"] / 1e6, np.clip(1 - row["r2_last"][0], 1e-3, 1)))
        name = row["model"].removesuffix(f"_{row['bits']}_bits")
        if row["method"] == "learned" or (row["bits"] < 8 and row["method"] == "nearest"):
            name += f", {row['method']}"
        series.setdefault(name, []).append(points[-1])
        offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
        axis.annotate(str(row["bits"]), points[-1], **offset)
    for number, (name, line) in enumerate(series.items()):
        style = line_style(number) | {"ms": 6, "lw": 0.8}
        axis.plot(*zip(*sorted(line), strict=True), label=name, **style)

    # the frontier: no smaller file follows the last layer better
    frontier = [p for p in sorted(points) if p[1] < min((q[1] for q in points if q < p), default=2)]
    line = {"color": "0.6", "lw": 5, "alpha": 0.35, "zorder": 0, "label": "frontier"}
    axis.step(*zip(*frontier, strict=True), where="post", **line)
    _scale(axis, max(loss for _, loss in points))
    axis.set_ylabel("R² of the last layer, held-out images")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="best")
    figure.savefig(file, dpi=100)


def _scale(axis, worst: float) -> None:
    """Set logarithmic axes of bytes and of 1 − R², which are labelled in MB and as R²."""
    axis.set(xscale="log", yscale="log", xlabel="MB (numbers: bits a weight)")
    axis.set_ylim(1.5 * worst, 8e-4)
    ticks = {loss: text for loss, text in _TICKS.items() if loss < 1.5 * worst}
    axis.set_yticks(list(ticks), list(ticks.values()))
    sizes = [10.0**power * digit for power in range(-3, 4) for digit in (1, 2, 5)]
    low, high = axis.get_xlim()
    shown = [megabytes for megabytes in sizes if low <= megabytes <= high]
    axis.set_xticks(shown, [f"{megabytes:g}" for megabytes in shown])
    axis.minorticks_off()
