"""What README.md and the other documents show: examples run, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/*.md", "examples/*.md", "examples/results/*/*.md", "benchmarks/results/*/*.md")
DOCUMENTS = [path for place in PLACES for path in sorted(ROOT.glob(place))]


def examples() -> list[object]:
    """README's blocks of Python, each named by the heading that it stands under."""
    heading, found = "", []
    for match in re.finditer(r"^#+ ([^\n]*)$|^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        heading = match[1] or heading
        if match[2]:
            found.append(pytest.param(match[2], id=heading))
    return found


@pytest.mark.parametrize("example", examples())
def test_example(example: str) -> None:
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_names_exists(document: Path) -> None:
    """Files and headings that are linked to, and targets of make."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = document.parent / link[0] if link[0] else document
        assert target.exists(), link[0]
        if link[1] and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert link[1][1:] in anchors, link[1]
    made = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for names in made for name in names.split()}
    named = re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M)
    assert set(named) <= targets, set(named) - targets
    if document == ROOT / "README.md":
        assert {"ladder", "test"} <= set(named)
