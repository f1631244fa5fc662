"""Links of the pages lead to files; keys of augmenters are described; citations are listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.augment.registry import AUGMENTERS
from tests.imports import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CITATION = re.compile(r"([A-Z][\w-]+(?: et al\.| and [A-Z]\w+)),? \(?((?:19|20)\d\d[a-z]?)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not target.startswith("http")]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


def test_every_key_of_an_augmenter_is_described() -> None:
    page = (ROOT / "docs" / "augmenters.md").read_text(encoding="utf-8")
    for kind in AUGMENTERS:
        for key in kind.model_fields:
            assert re.search(rf"`(augmenter: .*)?{key}\b[^`]*`", page), f"{kind.__name__}: {key}"


def test_everything_cited_is_listed() -> None:
    listed = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    sources = [
        *PAGES,
        *(
            path
            for folder in ("stages", "featurestore", "benchmarks")
            for path in sorted((ROOT / folder).rglob("*.py"))
        ),
    ]
    cited = {
        found for path in sources for found in CITATION.findall(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 40
    assert [
        found
        for found in sorted(cited)
        if not re.search(rf"\| {re.escape(found[0])} [\d, ]*{found[1]}", listed)
    ] == []
