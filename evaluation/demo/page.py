"""The demo's web page: teacher and Raptor side by side on one image. Needs the extra `demo`."""

import os
from html import escape
from typing import NamedTuple

# read when gradio is imported: no word of this page to anyone
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402
from gradio.utils import get_upload_folder, is_in_or_equal  # noqa: E402
from gradio_client.utils import is_file_obj, is_http_url_like, traverse  # noqa: E402
from PIL import Image  # noqa: E402

from .analysis import Analysis, Pair, analyse, read_upload  # noqa: E402
from .html import curves, layer_strip, layer_view, thumbnail  # noqa: E402

# the system's own, as the page may be opened where there is no network
_FONTS = {
    "font": ("ui-sans-serif", "system-ui", "sans-serif"),
    "font_mono": ("ui-monospace", "monospace"),
}
_CSS = """
.row {display: flex; flex-wrap: wrap; gap: 1rem; justify-content: center}
.row figure {margin: 0; flex: 1 1 150px; max-width: 260px}
.row figcaption, p.facts {text-align: center; margin: .4rem 0 0}
.row img.curve {flex: 1 1 340px; min-width: 0; background: white; border-radius: 4px; margin: 0}
img.pixels {image-rendering: pixelated; width: 100%; margin: 0; border-radius: 3px}
.strip {overflow-x: auto}
#strip table {border: 0; width: 100%; table-layout: fixed; border-collapse: separate;
  border-spacing: 3px}
.strip th, .strip td {padding: 2px; border: 0; text-align: center; font-weight: 400;
  font-size: .85rem}
.strip col:first-child {width: 5.5rem}
.strip tbody th {font-weight: 600}
.strip thead th.block {background: var(--neutral-200); color: var(--neutral-900)}
"""
_HEADING = """
# A teacher and its Raptor, layer by layer

**{teacher}** has {layers} layers. Its Raptor **{model}** makes them with {blocks} blocks, each
applied several times in a row: {phases}. Choose an image to see how closely it follows.
"""


class _OfflineBlocks(gr.Blocks):
    """A page that fetches nothing, and opens nothing but what was uploaded to it.

    Gradio would download the address that an event names as its file, and open a file of this
    machine, as it checks but the paths that come with its own mark (`meta`).
    """

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        """Refuse addresses, and files that nobody uploaded, in an event."""
        traverse(inputs, _check_uploaded, is_file_obj)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


class _Parts(NamedTuple):
    """What on the page takes part in events."""

    image: gr.Image
    layer: gr.Slider
    gallery: gr.Gallery
    view: gr.HTML
    results: list  # what `_show` gives, in its order


def _check_uploaded(file: dict) -> dict:
    """Return an uploaded file; raise gr.Error for one that lies elsewhere."""
    path = file["path"]
    if is_http_url_like(path):
        raise gr.Error("Upload the file itself: no address is fetched.", print_exception=False)
    if not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("Upload the file itself: no other one is opened.", print_exception=False)
    return file


def heading(pair: Pair, names: dict[str, str]) -> str:
    """Return what the page is about."""
    phases = ", ".join(
        f"block {p} makes layer{'s' if stop - start > 1 else ''} "
        + (f"{start + 1}–{stop}" if stop - start > 1 else f"{stop}")
        for p, (start, stop) in enumerate(pair.raptor.config.spans())
    )
    return _HEADING.format(
        **{role: escape(name) for role, name in names.items()},
        layers=pair.raptor.config.num_hidden_layers,
        blocks=len(pair.raptor.config.phases),
        phases=phases,
    )


def _existing_layer(pair: Pair, layer: float) -> int:
    """Return the layer nearest to what an event says: only the page knows the slider's bounds."""
    return min(max(0, round(layer)), pair.raptor.config.num_hidden_layers)


def _show(pair: Pair, image: Image.Image | None, layer: int) -> list:
    """Return what the page shows of an image: analysis, HTML, both models' classes."""
    spans, layer = pair.raptor.config.spans(), _existing_layer(pair, layer)
    analysis = None if image is None else analyse(pair, image)
    return [
        analysis,
        layer_view(analysis, layer, spans),
        layer_strip(analysis, spans),
        curves(analysis, spans),
        (analysis and analysis.raptor_top) or None,
        (analysis and analysis.teacher_top) or None,
    ]


def _lay_out(pair: Pair, examples: list[tuple[Image.Image, str]]) -> _Parts:
    """Return the page below its heading, with the first example in it."""
    depth = pair.raptor.config.num_hidden_layers
    analysis, view, strip, plots, *tops = _show(pair, examples[0][0] if examples else None, depth)
    with gr.Row():
        image = gr.Image(
            label="Your image", sources=["upload"], height=280, format="png", buttons=[],
            alt_text="The uploaded image", elem_id="image",
        )  # fmt: skip
        heads = {"Raptor": pair.raptor_head, "Teacher": pair.teacher_head}
        tops = [
            gr.Label(
                top, label=f"{name}: likeliest classes", visible=heads[name] is not None,
                elem_id=f"{name.lower()}_top",
            )
            for name, top in zip(heads, tops, strict=True)
        ]  # fmt: skip
    gr.Markdown("Or one of these:", visible=bool(examples))
    gallery = gr.Gallery(
        [(thumbnail(example), caption) for example, caption in examples], label="Examples",
        show_label=False, columns=10, rows=1, height=140, format="png", allow_preview=False,
        interactive=False, buttons=[], elem_id="examples", visible=bool(examples),
    )  # fmt: skip
    layer = gr.Slider(
        0, depth, depth, step=1, precision=0, label="Layer", buttons=[], elem_id="layer"
    )
    view = gr.HTML(view, elem_id="view")
    strip = gr.HTML(strip, elem_id="strip")
    plots = gr.HTML(plots, elem_id="curves")
    state = gr.State(analysis, time_to_live=3600)
    return _Parts(image, layer, gallery, view, [state, view, strip, plots, *tops])


def build_page(
    pair: Pair,
    names: dict[str, str],
    examples: list[tuple[Image.Image, str]],
    *,
    max_pixels: int,
) -> gr.Blocks:
    """Return the page, to be served by `serve`.

    Args:
        names: what to call `model` and `teacher`.
        examples: images with their captions; the first is shown at the start.
        max_pixels: of an image that is uploaded.
    """

    def show_upload(file: dict | None, layer: int) -> list:
        if file is None:
            raise gr.Error("Upload an image.", print_exception=False)
        # Gradio's own decoding knows no bounds, and fails without a word on the page
        try:
            image = read_upload(file["path"], max_pixels=max_pixels)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        return [gr.Gallery(selected_index=None), *_show(pair, image, layer)]

    def show_example(layer: int, chosen: gr.SelectData) -> list:
        return [None, *_show(pair, examples[chosen.index][0], layer)]

    def show_layer(analysis: Analysis | None, layer: int) -> str:
        return layer_view(analysis, _existing_layer(pair, layer), pair.raptor.config.spans())

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # uploads are deleted after an hour
    with _OfflineBlocks(
        title="Raptor demo", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.Markdown(heading(pair, names))
        parts = _lay_out(pair, examples)
        image, layer, gallery, results = parts.image, parts.layer, parts.gallery, parts.results
        uploaded = image.upload(
            show_upload, [image, layer], [gallery, *results], preprocess=False, **quiet
        )
        # what could not be shown does not stand beside the pictures of another image
        uploaded.failure(lambda: None, None, image, **quiet)
        gallery.select(show_example, layer, [image, *results], **quiet)
        layer.change(
            show_layer, [results[0], layer], parts.view, trigger_mode="always_last", **quiet
        )
    return page


def serve(
    page: gr.Blocks, *, host: str, port: int, share: bool = False, max_upload_megabytes: float
) -> None:
    """Serve the page until a signal comes; nothing of the disk but what the page shows itself."""
    page.queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=int(max_upload_megabytes * 2**20),
        allowed_paths=[],
        max_threads=8,
        state_session_capacity=64,
        theme=gr.themes.Default(**_FONTS),
        css=_CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
