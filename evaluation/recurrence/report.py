"""The report of a study: what held and what did not, made of its JSON files alone."""

from pathlib import Path

from raptor_hf.reports.tables import markdown_table
from raptor_hf.runs.files import read_json

from .claims import CLAIMS, judge
from .experiments import EXPERIMENTS
from .figures import draw
from .statistics import mean_in_words, values_of

_CAPTIONS = {
    "similarity": "Cosine similarity of the layers of every teacher, means over images, cls and "
    "mean patch; white: its three phases.",
    "gap": "ε, the mean distance of a Raptor's state from its teacher's, over the spread of the "
    "teacher's states: 1 is the best constant answer. Bands: all seeds.",
    "partitions": "Raptors on different partitions of the same teacher; bars are 95 % intervals "
    "over seeds, dots the students.",
    "alternatives": "What the same bytes can buy. All students had the same compute of training; "
    "dots are the students, lines join their means.",
    "training": "Teachers at other drop rates, and at other times of their training.",
}


def load_study(folder: str | Path) -> dict:
    """Read what a study has written: `maps`, and the rows of every finished experiment.

    Raises:
        FileNotFoundError: the folder has no `maps.json`.
    """
    folder = Path(folder)
    if not (folder / "maps.json").exists():
        raise FileNotFoundError(f"{folder} has no maps.json: run study.py first.")
    study = read_json(folder / "maps.json")
    for name in EXPERIMENTS:
        if (folder / f"{name}.json").exists():
            study[name] = read_json(folder / f"{name}.json")["rows"]
    return study


def write_report(folder: str | Path) -> str:
    """Write `study.md` and its figures into a study's folder; return what held, in a paragraph."""
    folder = Path(folder)
    study = load_study(folder)
    claims, pictures = judge(study), []
    for name, figure in draw(study):
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
        pictures.append(f"![{_CAPTIONS[name]}]({name}.png)\n\n{_CAPTIONS[name]}")
    summary = paragraph(claims, study)
    parts = ["# When is a ViT block-recurrent?", summary, claims_table(claims)]
    parts += [_figures_of(claims), *_tables(study), *pictures]
    (folder / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return summary


def paragraph(claims: list[dict], study: dict) -> str:
    """Return what held and what did not, in sentences."""
    about = study["about"]
    by_verdict: dict[str, list[str]] = {}
    for claim in claims:
        by_verdict.setdefault(claim["verdict"], []).append(claim["sentence"])
    sentences = [
        f"On {about['dataset']}, {about['num_images']} held-out images, with {about['units']:g} "
        "units of compute for every student."
    ]
    for verdict in ("reproduced", "not reproduced", "not testable here"):
        said = by_verdict.get(verdict, [])
        if said:
            number = f"**{verdict.capitalize()}**, {len(said)} of {len(CLAIMS)}."
            sentences += [number, *(f"{sentence}." for sentence in said)]
    return " ".join(sentences)


def claims_table(claims: list[dict]) -> str:
    """Return the verdicts as a table."""
    names = ("sentence", "source", "criterion", "verdict")
    heading = ["claim", "of", "criterion", "here"]
    return markdown_table(heading, [[claim[name] for name in names] for claim in claims])


def _figures_of(claims: list[dict]) -> str:
    """Return the figures that decided."""
    return "\n".join(
        f"- {claim['sentence']}: {claim['figures']}" for claim in claims if claim["figures"]
    )


def _tables(study: dict) -> list[str]:
    """Return a table an experiment: means and 95 % intervals over seeds."""
    labels = {
        "gap": ("k",),
        "partitions": ("k", "partition"),
        "alternatives": ("kind", "k"),
        "training": ("teacher",),
    }
    figures = {
        "r2": "R²", "r2 cls": "R² cls", "r2 patches": "R² patches", "last": "R², last state",
        "gap": "ε / spread", "accuracy": "accuracy",
    }  # fmt: skip
    tables = []
    for experiment, names in labels.items():
        rows = study.get(experiment)
        if not rows:
            continue
        lines = []
        for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
            label = dict(zip(names, key, strict=True))
            first = next(row for row in rows if label.items() <= row.items())
            cells = [mean_in_words(values_of(rows, figure, **label)) for figure in figures]
            cost = [f"{first['stored_parameters']:,}", f"{first['multiply_adds']:,}"]
            lines.append([*map(str, key), *cells, *cost, str(first["steps"])])
        heading = [*names, *figures.values(), "parameters", "multiply-adds", "steps"]
        tables.append(f"**{experiment}**\n\n{markdown_table(heading, lines)}")
    return tables
