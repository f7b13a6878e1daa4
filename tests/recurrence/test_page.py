"""The page: valid, self-contained, readable without eyes or colours, the same bytes every time."""

import html.parser
import json
import re
from collections import Counter

import numpy as np
import pytest

from evaluation.recurrence.charts import line_chart, matrix_chart, number, phase_chart
from evaluation.recurrence.maps import KIND, load_atlas
from evaluation.recurrence.page import make_page, write_page
from raptor_hf.phases.stability import cut_stability, resampled_distances
from tests.programs import ROOT

TEMPLATE = ROOT / "evaluation" / "recurrence" / "atlas.html"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def made_map(name, layers=6, methods=("recursive", "maxcut"), **more):
    """A map as the program writes it, of made-up distances."""
    rng = np.random.default_rng(layers)
    of_images = np.abs(np.subtract.outer(range(layers), range(layers))) / layers
    of_images = of_images + 0.05 * rng.random((9, layers, layers))
    resampled = resampled_distances(of_images, 10)
    cuts = {
        method: {
            str(k): {**cut_stability(resampled[0], resampled, k, method), "quality": None}
            for k in (2, 3, 6)
        }
        for method in methods
    }
    curve = {"mean": rng.random(layers).tolist(), "std": [0.1] * layers}
    state = {"mean": rng.random(layers + 1).tolist(), "std": [0.1] * (layers + 1)}
    facts = {"kind": KIND, "name": name, "model_type": "vit", "num_layers": layers}
    facts |= {"num_channels": 24, "num_tokens": 5, "num_parameters": 1_234_567, "seed": 0}
    facts |= {"image_size": [8, 8], "dataset": "digits", "split": "test", "num_images": 9}
    facts |= {"weights_sha256": "0" * 64, "distance": resampled[0].tolist(), "cuts": cuts}
    facts |= {"speed": {"patches": curve}, "norm": {"patches": state}}
    facts |= {"update_rank": {"stable": curve}, "variance": {"patches": state["mean"]}}
    return facts | more


GAPS = [
    {"k": 3, "phases": [2, 2, 2], "stored_parameters": 30_000, "r2": {"all": 0.9, "cls": 0.8},
     "units": 40, "to_spread": {"all": 0.97}},
    {"k": 2, "phases": [3, 3], "stored_parameters": 20_000, "r2": {"all": 0.7},
     "units": 40, "to_spread": {}},
]  # fmt: skip


@pytest.fixture
def maps():
    speed = {"cls": made_map("")["speed"]["patches"]}
    with_cls = made_map("b <script>alert(1)</script> & Co", gaps=GAPS)
    with_cls["speed"] = speed | with_cls["speed"]
    return [with_cls, made_map("deep", 16, ["maxcut"])]


class Reader(html.parser.HTMLParser):
    """What is open, which names and links there are, what a picture is called."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.found, self.headings = [], [], Counter(), []
        self.attributes = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found[tag] += 1
        self.attributes.append((tag, attributes, list(self.open)))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def test_the_page_is_valid_and_needs_nothing_else(maps):
    text = make_page(maps, TEMPLATE)
    page = Reader(text)
    assert page.open == [] and max(Counter(page.ids).values()) == 1
    assert "script" not in page.found and "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.findall(r"https?://|//\w+\.|@import|url\(", text)
    links = [a["href"] for tag, a, _ in page.attributes if tag == "a"]
    assert links and {link.removeprefix("#") for link in links} <= set(page.ids)
    assert "None" not in text and "nan" not in re.sub(r"[a-z-]*nan[a-z]+", "", text)


def test_the_page_is_read_aloud_and_driven_by_keys(maps):
    page = Reader(make_page(maps, TEMPLATE))
    kinds = {tag: [a for t, a, _ in page.attributes if t == tag] for tag in page.found}
    assert kinds["html"][0]["lang"] == "en"
    assert all(page.found[tag] == 1 for tag in ("main", "nav", "header", "h1", "title"))
    assert page.headings[0] == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(later <= sooner + 1 for sooner, later in steps)
    for svg in kinds["svg"]:
        assert svg["role"] == "img" and len(svg["aria-label"]) > 20
    named = [a["aria-labelledby"] for tag, a, _ in page.attributes if tag == "section"]
    assert set(named) <= set(page.ids)
    # every picture has its numbers beside it, in a table that keys can scroll
    assert page.found["figure"] == page.found["svg"] == page.found["details"]
    tables = [inside for tag, _, inside in page.attributes if tag == "table"]
    assert sum("figure" in inside for inside in tables) == page.found["figure"]
    scrolled = [a for a in kinds["div"] if a.get("class") == "scroll"]
    assert len(scrolled) == len(tables)
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolled)
    labels = [a["aria-label"] for a in scrolled]
    assert len(set(labels)) == len(labels)
    style = TEMPLATE.read_text()
    for rule in ("prefers-reduced-motion", "prefers-color-scheme: dark", ":focus-visible"):
        assert rule in style


def test_all_teachers_are_compared_by_a_method_that_all_have(maps):
    text = make_page(maps, TEMPLATE)
    assert "Method: maxcut, exact max-cut of runs of layers" in text
    assert "Method: the first that each teacher has" in make_page(
        [made_map("a", methods=["ncut"]), maps[1]], TEMPLATE
    )
    assert "no partition" in text  # recursive, k = 6


def test_gaps_of_raptors_are_shown_where_there_are_some(maps):
    text = make_page(maps, TEMPLATE)
    assert text.count("R² of Raptors, b &lt;script") >= 1
    for word in ("stored parameters", "30,000", "R² cls", "ε / spread all", "0.97", "40 units"):
        assert word in text
    assert "stored parameters" not in make_page(maps[1:], TEMPLATE)


def test_the_page_has_the_same_bytes_every_time(maps, tmp_path):
    for folder, order in (("one", (0, 1)), ("two", (1, 0))):
        (tmp_path / folder).mkdir()
        for index in order:
            content = json.dumps(maps[index])
            (tmp_path / folder / f"{index}.json").write_text(content)
    pages = [write_page(tmp_path / folder, TEMPLATE).read_bytes() for folder in ("one", "two")]
    assert pages[0] == pages[1] == make_page(load_atlas(tmp_path / "one"), TEMPLATE).encode()


def test_files_that_are_no_maps(maps, tmp_path):
    assert write_page(tmp_path, TEMPLATE) is None
    (tmp_path / "other.json").write_text('{"kind": "something else"}')
    assert load_atlas(tmp_path) == []
    (tmp_path / "a.json").write_text(json.dumps(maps[1]))
    (tmp_path / "b.json").write_text(json.dumps(maps[1]))
    with pytest.raises(ValueError, match="b.json: another phase map .* is called 'deep', too"):
        load_atlas(tmp_path)
    del maps[1]["distance"]
    (tmp_path / "a.json").write_text(json.dumps(maps[1]))
    with pytest.raises(ValueError, match="a.json is a phase map that lacks distance"):
        load_atlas(tmp_path)


def test_charts_are_drawn_to_scale():
    svg = matrix_chart([[0, 0.5], [0.5, 0]], [1], "two layers")
    assert (
        svg.count('fill="#f7fbff"') == 2 + 1 and svg.count('fill="#08306b"') == 2 + 1
    )  # and scale
    bars = phase_chart([("one", 4, [3, 1], [0, 0, 1]), ("two", 2, None, [0])], "phases")
    widths = [float(w) for w in re.findall(r'class="p\d".*?width="([\d.]+)"', bars)]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.2)
    assert "no partition" in bars and bars.count('class="share"') == 1
    lines = line_chart([("a & b", [1, 2, 3], [0.0, None, 2.0])], "lines", x_title="x", y_title="y")
    assert "a &amp; b" in lines and lines.count("<path transform") == 2 + 3  # and the legend
    assert [number(value) for value in (None, 0, 0.12345, 12345.6, 1e-5)] == [
        "–", "0", "0.123", "12,346", "1.00e-05",
    ]  # fmt: skip
