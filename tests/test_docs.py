"""Links of the pages lead somewhere; keys of augmenters are described; citations are listed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.augment.registry import AUGMENTERS
from stages.commands.options import load_preset
from stages.commands.params import PARAMS
from stages.common.config import parse, with_settings
from tests.imports import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "docs" / "results").glob("*.md")), ROOT / "results" / "README.md"]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TABLES = re.compile(r"<!-- tables: .*?<!-- end of tables -->", re.DOTALL)
MOST_WORDS = 15_000
CITATION = re.compile(r"([A-Z][\w-]+(?: et al\.| and [A-Z]\w+)),? \(?((?:19|20)\d\d[a-z]?)\b")


def anchors(page: Path) -> list[str]:
    """Anchors that GitHub, and the site, give to the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#{1,4} (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_two_headings_of_one_anchor(page: Path) -> None:
    if page.name != "CHANGELOG.md":  # whose releases have sections of the same names
        assert len(set(anchors(page))) == len(anchors(page))


def words(page: Path) -> int:
    """Count the words of a page outside code blocks and generated tables."""
    text = TABLES.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return sum(any(map(str.isalnum, word)) for word in re.split(r"[\s|]+", "\n".join(lines)))


def test_the_pages_are_short() -> None:
    """All pages but two logs: the lab log, and the changes by release."""
    counts = {
        page: words(page) for page in LINKED if page.name not in ("lab-log.md", "CHANGELOG.md")
    }
    assert sum(counts.values()) <= MOST_WORDS, counts


def test_words_are_counted_outside_code_and_generated_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Two words — here.\n\n    a code block\n\n```sh\ncode\n```\n\n| a | b-c |\n|---|---|\n\n"
        "<!-- tables: sizes -->\n\n| x | y |\n\n<!-- end of tables -->\n"
    )
    assert words(page) == 5


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


def test_the_changes_that_the_page_on_your_own_data_asks_for_are_accepted() -> None:
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    block = page.partition("change these lines:\n\n")[2].partition("\n\n")[0]
    changes = YAML(typ="safe").load(textwrap.dedent(block))
    settings = {
        f"{section}.{key}": value
        for section, keys in changes.items()
        for key, value in keys.items()
    }
    params = parse(PARAMS, with_settings(load_preset("few-images").plain(), settings))
    assert params.compare.names[0] == "baseline"
    assert params.compare.names[-1] == "featuregan-edited"


def test_named_variants_of_the_pages_are_described_somewhere() -> None:
    described = set(load_preset("quickstart").variants)
    for study in (ROOT / "studies").glob("*.yaml"):
        described |= set(re.findall(r"variants\.([\w-]+)", study.read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:class-transfer|featuregan|mirrored)-[\w-]*perturbed)`", page))
    assert named
    assert named <= described
