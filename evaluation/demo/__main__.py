"""A web page that shows a teacher and its Raptor side by side on any image, layer by layer.

    python -m evaluation.demo

shows the digits models of `bash training/reproduce.sh digits` on http://127.0.0.1:7860 after ten
seconds; `--teacher_head outputs/digits/teacher` adds the teacher's classes. Any other pair:

    python -m evaluation.demo --model path/to/raptor \
        --teacher facebook/dinov2-with-registers-small --dataset path/to/images --split val

Needs the extra `demo`, and `train` for the digits. As a Space of Hugging Face: this repository with
an `app.py` that runs this package; a `requirements.txt` with the extra `demo` (and scikit-learn for
the digits); and which models, as the Space's variables DEMO_MODEL, DEMO_TEACHER, DEMO_TEACHER_HEAD,
DEMO_DATASET and DEMO_SPLIT. Host and port are what the Space sets.
"""

import os
from dataclasses import dataclass, field

from evaluation.demo.analysis import load_pair, pick_examples
from evaluation.demo.page import build_page, serve
from raptor_hf.data.arguments import ReadingArguments
from raptor_hf.runs.arguments import check_positive, parse_arguments
from raptor_hf.runs.files import public_name
from raptor_hf.runs.processes import run_program


def variable(name: str, default: str) -> str:
    """An environment variable, which is how a Space is told what to show."""
    return os.environ.get(name, default)


@dataclass
class Arguments:
    """Which models, which examples, and who may look."""

    model: str = field(
        default=variable("DEMO_MODEL", "outputs/digits/seed_0/classification/models/raptor_k3"),
        metadata={"help": "a Raptor: folder or Hub id"},
    )
    teacher: str = field(
        default=variable("DEMO_TEACHER", "outputs/digits/teacher"),
        metadata={"help": "the model that it imitates: folder or Hub id"},
    )
    teacher_head: str = field(
        default=variable("DEMO_TEACHER_HEAD", ""),
        metadata={"help": "linear head for the teacher's classes: file, folder or Hub id"},
    )
    revision: str | None = field(default=None, metadata={"help": "of the Raptor on the Hub"})
    teacher_revision: str | None = field(default=None, metadata={"help": "of the teacher"})
    dataset: str = field(
        default=variable("DEMO_DATASET", "digits"),
        metadata={"help": "where examples come from: digits, an image folder, a Hub id, none"},
    )
    split: str = field(default=variable("DEMO_SPLIT", "test"), metadata={"help": "of the dataset"})
    host: str = field(
        default=variable("GRADIO_SERVER_NAME", "127.0.0.1"),
        metadata={"help": "address to listen on; 0.0.0.0 lets other machines in"},
    )
    port: int = int(variable("GRADIO_SERVER_PORT", "7860"))
    share: bool = field(default=False, metadata={"help": "a public address through gradio.live"})
    max_upload_megabytes: float = field(default=5.0, metadata={"help": "larger files are refused"})

    def __post_init__(self):
        check_positive(self, "max_upload_megabytes")


PARTS = (Arguments, ReadingArguments)


def main(argv: list[str] | None = None) -> None:
    """Load both models, build the page, serve it."""
    arguments, reading = parse_arguments(*PARTS, argv=argv, defaults={"max_megapixels": 25.0})
    pair = load_pair(
        arguments.model,
        arguments.teacher,
        teacher_head=arguments.teacher_head or None,
        revision=arguments.revision,
        teacher_revision=arguments.teacher_revision,
    )
    examples = []
    if arguments.dataset != "none":
        examples = pick_examples(arguments.dataset, arguments.split, reading=reading)
    names = {name: public_name(getattr(arguments, name)) for name in ("model", "teacher")}
    page = build_page(pair, names, examples, max_pixels=int(reading.max_megapixels * 1e6))
    serve(
        page,
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
        max_upload_megabytes=arguments.max_upload_megabytes,
    )


if __name__ == "__main__":
    run_program(main, alone=True)
