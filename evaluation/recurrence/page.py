"""The page of the atlas: a pure function of its JSON files, one HTML file that needs nothing else.

Its markup and style are the template `evaluation/recurrence/atlas.html`. There is no script in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from raptor_hf.phases.stability import boundaries

from .charts import line_chart, matrix_chart, number, percent, phase_chart
from .maps import file_name, load_atlas

_SHOWN_K = 3  # of the lines in a matrix, where there is such a cut
_METHODS = {
    "recursive": "repeated exact max-cut, as published",
    "maxcut": "exact max-cut of runs of layers",
    "ncut": "normalised cut of runs of layers",
}


class Chart(NamedTuple):
    """A picture, what it shows in words, and its numbers."""

    name: str
    svg: Markup
    caption: str
    heading: list[str]
    rows: list[list[str]]


def write_page(folder: str | Path, template: str | Path) -> Path | None:
    """Write `atlas.html` of all maps in a folder; None where there is no map. Errors as
    `load_atlas`.
    """
    maps = load_atlas(folder)
    if not maps:
        return None
    path = Path(folder) / "atlas.html"
    path.write_text(make_page(maps, template), encoding="utf-8")
    return path


def make_page(maps: Sequence[dict], template: str | Path) -> str:
    """Return the page of some maps, as `load_atlas` gives them.

    Args:
        template: `evaluation/recurrence/atlas.html`.
    """
    source = Path(template).read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(source).render(
        overview=overview(maps),
        cuts=cuts_of_all(maps),
        comparisons=comparisons(maps),
        teachers=[
            {"name": one["name"], "id": file_name(one["name"]), "facts": facts(one)}
            | {"charts": charts(one), "gaps": gaps(one)}
            for one in maps
        ],
    )


def overview(maps: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the table of what the teachers are: heading, rows."""
    heading = ["teacher", "type", "layers", "channels", "tokens", "parameters", "images of"]
    heading += ["number of images", "dataset"]
    rows = [
        [
            one["name"], one["model_type"], str(one["num_layers"]), str(one["num_channels"]),
            str(one["num_tokens"]), f"{one['num_parameters'] / 1e6:.3g} M",
            "×".join(map(str, one["image_size"])), f"{one['num_images']:,}",
            f"{one['dataset']} ({one['split']})",
        ]
        for one in maps
    ]  # fmt: skip
    return heading, rows


def common_method(maps: Sequence[dict]) -> str | None:
    """Return the first method that all maps hold cuts of, if there is one."""
    return next((m for m in maps[0]["cuts"] if all(m in one["cuts"] for one in maps)), None)


def cuts_of_all(maps: Sequence[dict]) -> tuple[list[str], list[list[str]], str]:
    """Return the table of everybody's cuts: heading, rows, and by which method."""
    method = common_method(maps)
    ks = sorted({int(k) for one in maps for cuts in one["cuts"].values() for k in cuts})
    rows = []
    for one in maps:
        own = one["cuts"][method or next(iter(one["cuts"]))]
        rows.append([one["name"], *(cut_in_words(own.get(str(k))) for k in ks)])
    said = f"{method}, {_METHODS[method]}" if method else "the first that each teacher has"
    return ["teacher", *(f"k = {k}" for k in ks)], rows, said


def cut_in_words(cut: dict | None) -> str:
    """Return phases and how often they come out again."""
    if cut is None or cut["phases"] is None:
        return "–" if cut is None else "no partition"
    return f"{phases_in_words(cut['phases'])} ({percent(cut['same'])})"


def phases_in_words(phases: Sequence[int]) -> str:
    """Return phases as they are read: `7, 3, 2`."""
    return ", ".join(map(str, phases))


def facts(one: dict) -> list[tuple[str, str]]:
    """Return what is known of a teacher besides the overview."""
    source = one.get("source", "")
    tokens = ", ".join(f"{count} {name}" for name, count in one.get("token_groups", {}).items())
    versions = one.get("environment", {})
    kept = ("torch", "transformers", "commit")
    return [
        ("model", source + (f", commit {one['revision']}" if one.get("revision") else "")),
        ("weights (SHA-256)", one["weights_sha256"]),
        ("tokens", f"{one['num_tokens']}: {tokens}, then patches"),
        ("images", f"{one['num_images']:,} of {one['dataset']} ({one['split']})"),
        ("made with", ", ".join(f"{k} {versions[k]}" for k in kept if versions.get(k))),
    ]


def charts(one: dict) -> list[Chart]:
    """Return the charts of one teacher."""
    made = [_matrix(one), *(_cuts(one, method) for method in one["cuts"])]
    layers = list(range(1, one["num_layers"] + 1))
    curves = {
        "turn of each layer (degrees)": {k: v["mean"] for k, v in one["speed"].items()},
        "rank of each layer's update": {k: v["mean"] for k, v in one["update_rank"].items()},
        "norm of states": {k: v["mean"] for k, v in one["norm"].items()},
        "variance of states": one["variance"],
    }
    captions = (
        "How far each layer turns a state, mean over images and tokens of a group.",
        "How many directions the update of all tokens takes: stable and effective rank, mean over "
        "images.",
        "Length of states, mean over images and tokens; layer 0 is the embeddings. Logarithmic.",
        "Mean over channels of the variance over images and tokens; layer 0 is the embeddings. "
        "Logarithmic: what is 0 is not drawn.",
    )
    for (title, by_name), caption in zip(curves.items(), captions, strict=True):
        steps = layers if len(next(iter(by_name.values()))) == len(layers) else [0, *layers]
        lines = [(name, steps, values) for name, values in by_name.items()]
        made.append(
            _curves(
                title, lines, caption, name_of=one["name"], x_title="layer",
                logarithmic=title.endswith("of states"),
            )
        )  # fmt: skip
    return made


def _matrix(one: dict) -> Chart:
    """Draw the layer distances, with the cuts of one k."""
    method, cuts = next(iter(one["cuts"].items()))
    having = [int(k) for k, cut in cuts.items() if cut["phases"]]
    k = _SHOWN_K if _SHOWN_K in having else next(iter(having), None)
    at = boundaries(cuts[str(k)]["phases"]) if k else []
    layers = range(1, one["num_layers"] + 1)
    lines = f" Lines: the cuts for k = {k} ({method})." if at else ""
    return Chart(
        "layer distances",
        matrix_chart(one["distance"], at, f"Layer distances of {one['name']}, darker is farther."
                     f"{lines} The numbers are in the table that follows."),
        f"Cosine distance between the states after two layers; darker is farther.{lines}",
        ["layer", *map(str, layers)],
        [[str(n), *(f"{d:.3f}" for d in one["distance"][n - 1])] for n in layers],
    )  # fmt: skip


def _cuts(one: dict, method: str) -> Chart:
    """Draw the cuts of one method with their stability."""
    heading = ["k", "phases", "same", "boundaries shared", "agreement", "no partition"]
    heading += ["cut share", "contrast", "most frequent in resamples"]
    rows, bars = [], []
    for k, cut in one["cuts"][method].items():
        quality, phases = cut.get("quality") or {}, cut["phases"]
        shared = "–" if cut["shared"] is None else f"{cut['shared']:.2f} of {int(k) - 1}"
        frequent = "; ".join(
            f"{phases_in_words(p['phases'])} ({percent(p['share'])})"
            for p in cut["partitions"][:2]
        )  # fmt: skip
        rows.append(
            [k, phases_in_words(phases) if phases else "none", percent(cut["same"]), shared]
            + [percent(cut["agreement"]), percent(cut["no_partition"])]
            + [percent(quality.get("cut_share")), number(quality.get("contrast")), frequent or "–"]
        )
        said = f"k = {k}, the same in {percent(cut['same'])}" if phases else f"k = {k}"
        bars.append((said, one["num_layers"], phases, cut["boundaries"]))
    resamples = next(iter(one["cuts"][method].values()))["resamples"] if rows else 0
    words = "; ".join(f"k = {row[0]}: {row[1]}, same in {row[2]}" for row in rows)
    return Chart(
        f"phases by {method}",
        phase_chart(bars, f"Phases of {one['name']} by {method}. {words}."),
        f"Phases by {method} ({_METHODS.get(method, method)}). Columns: the share of {resamples} "
        "bootstrap resamples of the images with a cut there; a full one is always.",
        heading,
        rows,
    )


def _curves(
    title: str, lines: list, caption: str, *, name_of: str, x_title: str, logarithmic: bool = False
) -> Chart:
    """Draw lines, and write their numbers; lines may have other x than each other."""
    steps = sorted({x for _, xs, _ in lines for x in xs})
    by_line = [dict(zip(xs, ys, strict=True)) for _, xs, ys in lines]
    spans = [
        f"{name} {number(min(known))} to {number(max(known))}"
        for name, _, ys in lines
        if (known := [y for y in ys if y is not None])
    ]
    label = f"{title}, {name_of}: {', '.join(spans)}. The numbers are in the table that follows."
    return Chart(
        title,
        line_chart(lines, label, x_title=x_title, y_title=title, logarithmic=logarithmic),
        caption,
        [x_title, *(name for name, _, _ in lines)],
        [[number(x), *(number(line.get(x)) for line in by_line)] for x in steps],
    )


def comparisons(maps: Sequence[dict]) -> list[Chart]:
    """Return the charts of several teachers together, over relative depth."""
    if len(maps) < 2:  # its own charts say it all
        return []
    made, method = [], common_method(maps)
    for k in sorted({int(k) for one in maps for k in one["cuts"].get(method, {})}):
        having = [
            (one, one["cuts"][method][str(k)]) for one in maps if str(k) in one["cuts"][method]
        ]
        bars = [(one["name"], one["num_layers"], c["phases"], c["boundaries"]) for one, c in having]
        rows = [[one["name"], cut_in_words(cut)] for one, cut in having]
        words = "; ".join(": ".join(row) for row in rows)
        made.append(
            Chart(
                f"{k} phases of all",
                phase_chart(bars, f"Phases for k = {k} by {method}, share of the same. {words}."),
                f"k = {k} by {method}: phases as shares of the depth, columns as above.",
                ["teacher", "phases (the same in resamples)"],
                rows,
            )
        )
    for figure, group, title in (
        ("speed", "cls", "turn of the cls token (degrees)"),
        ("speed", "patches", "turn of patches (degrees)"),
        ("update_rank", "stable", "stable rank of updates"),
    ):
        lines = [
            (one["name"], [n / one["num_layers"] for n in range(1, one["num_layers"] + 1)],
             one[figure][group]["mean"])
            for one in maps
            if group in one[figure]
        ]  # fmt: skip
        if lines:
            caption = f"{title[0].upper()}{title[1:]}, over the share of the depth."
            x_title = "share of the depth"
            made.append(_curves(title, lines, caption, name_of="all teachers", x_title=x_title))
    return made


def gaps(one: dict) -> Chart | None:
    """Return what Raptors of so many blocks reach, where the map says so (see `atlas`)."""
    entries = sorted(one.get("gaps") or [], key=lambda entry: entry["k"])
    if not entries:
        return None
    kinds = [
        (part, name)
        for part in ("r2", "to_spread")
        for name in dict.fromkeys(name for entry in entries for name in entry.get(part) or {})
    ]
    ks = [entry["k"] for entry in entries]
    lines = [
        (f"R² {name}", ks, [(entry.get("r2") or {}).get(name) for entry in entries])
        for part, name in kinds
        if part == "r2"
    ]
    caption = (
        "How far Raptors of k blocks are from the teacher on images that they did not learn from, "
        f"after {entries[0]['units']:g} units of compute each: R², and ε, the mean distance of "
        "states, over their spread. Means over layers."
    )
    chart = _curves("R² of Raptors", lines, caption, name_of=one["name"], x_title="k")
    words = {"r2": "R²", "to_spread": "ε / spread"}
    heading = ["k", "phases", "stored parameters", *(f"{words[p]} {name}" for p, name in kinds)]
    rows = [
        [str(entry["k"]), phases_in_words(entry["phases"]), f"{entry['stored_parameters']:,}"]
        + [number((entry.get(part) or {}).get(name)) for part, name in kinds]
        for entry in entries
    ]
    return chart._replace(heading=heading, rows=rows)
