"""The atlas: one page of the phases of many teachers, beside those of turns without phases.

    python -m evaluation.recurrence.atlas --output_dir outputs/atlas \
        --results "digits teacher=outputs/digits/nulls" "My own ViT=outputs/mine/nulls"

Reads nulls.json of every folder, of `evaluation.recurrence.nulls`, and writes README.md, with a row
a teacher and measure, and atlas.png.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.plotting import make_panels
from evaluation.recurrence.nulls_page import GATHER, draw_matrix, judge_nulls, phases_cell
from evaluation.verdicts import verdict_word
from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.arguments import named_folders, parse_arguments
from raptor_hf.runs.files import read_json
from raptor_hf.runs.processes import run_program

_HEAD = """# Atlas of phases

Where the depth of Vision Transformers falls into phases, runs of similar layers, by three measures
of similarity, after "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941).

Max-cut cuts any drift. In brackets: the phases of independent turns as large as the teacher's. Same
in halves: the share of halves of the images with these cuts, at the k with the fewest. Beyond
turns: whether layers gather in phases more than these turns, and more than in null networks."""


@dataclass(kw_only=True)
class Arguments:
    """Which teachers, and where the page goes."""

    _argument_group_name = "inputs and outputs"

    results: list[str] = field(
        metadata={"help": "folders with nulls.json of teachers: NAME=FOLDER, or FOLDER"}
    )
    output_dir: str = field(metadata={"help": "folder of README.md and atlas.png"})


def cuts_table(maps: Mapping[str, dict]) -> str:
    """Return the max-cut phases of all teachers beside their nulls: a row a teacher and measure."""
    rows = []
    for name, result in maps.items():
        teacher = result["networks"][result["teacher"]]
        verdicts = {claim: by_name[result["teacher"]] for claim, by_name in judge_nulls(result)}
        images = f"{name}, {result['num_images']:,} images of {result['dataset']}"
        for measure, by_tokens in teacher["phases"].items():
            cuts = by_tokens["all"]["cuts"]
            row = [images.replace("|", "\\|"), measure]
            row += [phases_cell(cut, "maxcut") for cut in cuts.values()]
            row.append(f"{min(cut['same'] for cut in cuts.values()):.0%}".replace("%", " %"))
            rows.append([*row, verdict_word(verdicts[GATHER[measure]])])
    ks = [f"k = {k}" for k in cuts]
    return markdown_table(["teacher", "measure", *ks, "same in halves", "beyond turns"], rows)


def draw_atlas(maps: Mapping[str, dict]) -> Figure:
    """Draw the distances of layers, a row a teacher, a column a measure, on one scale of colours.

    Above the diagonal stand those of independent turns; lines part three phases of either.
    """
    figure, axes = make_panels(len(maps), 3)
    figure.set_size_inches(6.4, 2 * len(maps) + 0.3)
    for row, (name, result) in zip(axes, maps.items(), strict=True):
        phases = result["networks"][result["teacher"]]["phases"]
        for axis, (measure, by_tokens) in zip(row, phases.items(), strict=True):
            image = draw_matrix(axis, by_tokens["all"])
            axis.set_title(measure, fontsize="small")
        row[0].set_ylabel(name[:32], fontsize="small")
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.5)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Write the page of all teachers that are named."""
    (own,) = parse_arguments(Arguments, argv=argv)
    results = named_folders("--results", own.results).items()
    maps = {name: read_json(Path(source) / "nulls.json") for name, source in results}
    folder = Path(own.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    draw_atlas(maps).savefig(folder / "atlas.png", dpi=110, metadata={"Software": None})
    parts = [_HEAD, cuts_table(maps), "![distances of layers](atlas.png)"]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"page: {folder / 'README.md'}")


if __name__ == "__main__":
    run_program(main, alone=True)
