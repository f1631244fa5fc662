"""Tables of docs/results/ are those of the result files, and the summary repeats their gains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stages.commands.studies import compare as command
from stages.studies import compare as comparison
from stages.studies.tables import as_markdown
from tests.imports import ROOT

SECTION = re.compile(
    r"^(?:#+ .*|    python pipeline\.py compare results/(?:.*\\\n)*.*)$", re.MULTILINE
)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


DETAILS = sorted((ROOT / "docs" / "results").glob("*.md"))
GAIN = re.compile(
    r"([+-]?\d+\.\d)\**(?: points?)? \((?:95% interval )?([+-]?\d+\.\d) to ([+-]?\d+\.\d)"
)


def sections() -> list[tuple[str, str]]:
    """Each ``compare`` command of the pages, and the text up to the next command or heading."""
    found = []
    for page in (path.read_text(encoding="utf-8") for path in DETAILS):
        starts = list(SECTION.finditer(page))
        ends = [*(start.start() for start in starts[1:]), len(page)]
        found += [
            (start[0].replace("\\\n", " ").strip(), page[start.end() : end])
            for start, end in zip(starts, ends, strict=True)
            if not start[0].startswith("#")
        ]
    return found


def gains(path: Path) -> set[tuple[float, ...]]:
    """Differences with their intervals on a page; of a loss the size and its bounds, too."""
    return {
        tuple(sorted(abs(float(number)) for number in found))
        for found in GAIN.findall(path.read_text(encoding="utf-8").replace("\n", " "))
    }


def test_the_summary_has_the_gains_of_the_detailed_pages() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("results.md", "faq.md"))]
    summary = set().union(*map(gains, pages))
    assert len(summary) >= 20
    missing = summary - set().union(*map(gains, DETAILS))
    assert not missing, (
        f"README.md, docs/results.md or docs/faq.md has other gains: {sorted(missing)}"
    )


@pytest.mark.parametrize(
    ("written", "text"), sections(), ids=[written.split(" --")[0] for written, _ in sections()]
)
@pytest.mark.medium
def test_the_page_has_the_tables_that_its_commands_write(
    written: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = command.make_context("compare", shlex.split(written.partition("#")[0])[3:]).params
    groups = comparison.read_groups(options["results"], options["seeds"])
    compared = comparison.compare(
        groups, options["classes"], options["baseline"], options["block_length"]
    )
    makes = {table.replace(" ", "") for table in TABLE.findall(as_markdown(compared))}
    written_below = TABLE.findall(text)
    assert written_below, f"there is no table below `{written}`"
    for table in written_below:
        if table.replace("**", "").replace(" ", "") not in makes:
            pytest.fail(
                f"`{written}` writes no such table into its comparison.md:\n{table}", pytrace=False
            )


def test_the_page_has_such_commands() -> None:
    assert len(sections()) >= 4
