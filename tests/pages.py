"""README.md and the pages of docs/, and the code blocks in them.

The info string of a block says whether a test runs it: "bash run NAME", or "bash not run: REASON".
"""

import re
from typing import NamedTuple

from tests.programs import ROOT

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, and what its info string says besides."""

    language: str
    mark: str
    code: str

    @property
    def name(self):
        """What a test asks for it by; None for a block that is not run."""
        return self.mark.removeprefix("run ") if self.mark.startswith("run ") else None


def read(page):
    """The text of a page."""
    return (ROOT / page).read_text()


def blocks(page):
    """All fenced blocks of a page."""
    return [
        Block(*(*info.split(" ", 1), "")[:2], code) for info, code in FENCED.findall(read(page))
    ]


def block(page, name):
    """The code of the block of a page that is marked `run NAME`."""
    (code,) = (block.code for block in blocks(page) if block.name == name)
    return code


def replaced(code, changes):
    """The code with names of this machine; every name that is replaced must be there."""
    for written, here in changes.items():
        assert written in code, written
        code = code.replace(written, str(here))
    return code
