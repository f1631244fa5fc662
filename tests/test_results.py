"""Tables of docs/results/ are those of the result files; the summary repeats their gains."""

from __future__ import annotations

import re
from pathlib import Path

import click
import numpy as np
import pytest

from benchmarks.result_tables import PAGES, PART, with_tables
from tests.imports import ROOT

GAIN = re.compile(
    r"([+-]?\d+\.\d)\**(?: points?)? \((?:95% interval )?([+-]?\d+\.\d) to ([+-]?\d+\.\d)"
)
ROW = re.compile(r"\| ([+-]\d+\.\d\d)[^|]*\| ([+-]\d+\.\d\d) to ([+-]\d+\.\d\d) \|")


def numbers(pattern: re.Pattern[str], path: Path) -> set[tuple[float, ...]]:
    """Differences with both ends of their intervals on a page, as written."""
    text = path.read_text(encoding="utf-8").replace("\n", " ")
    return {tuple(map(float, found)) for found in pattern.findall(text)}


def test_the_summary_has_the_gains_of_the_detailed_pages() -> None:
    names = ("results.md", "faq.md", "unlabelled.md", "gan-quality.md", "your-data.md")
    pages = [ROOT / "README.md", *(ROOT / "docs" / name for name in names)]
    summary = set().union(*(numbers(GAIN, page) for page in pages))
    assert len(summary) >= 20
    detailed = set().union(*(numbers(kind, page) for kind in (GAIN, ROW) for page in PAGES))
    detailed |= {(-value, -high, -low) for value, low, high in detailed}  # of a loss its size
    missing = [
        gain
        for gain in sorted(summary)
        if not any(np.allclose(gain, other, rtol=0, atol=0.0501) for other in detailed)
    ]
    assert not missing, f"README.md or one of {names} has other gains: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.medium
def test_the_tables_of_a_page_are_those_of_the_result_files(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    written = page.read_text(encoding="utf-8")
    assert with_tables(written) == written, f"{page.name}: run `make result-tables`"


def test_every_command_has_tables() -> None:
    parts = [part for page in PAGES for part in PART.finditer(page.read_text(encoding="utf-8"))]
    assert sum(bool(part["arguments"]) for part in parts) >= 4
    without = [
        part[0]
        for part, following in zip(parts, [*parts[1:], None], strict=True)
        if part["arguments"] and (following is None or following["arguments"])
    ]
    assert without == []


def test_tables_replace_what_is_between_the_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = """Before.

    python pipeline.py compare results/thesis/table-4.1 \\
        --class cat   # a comment

<!-- tables: variants, gans -->
| old |
<!-- end of tables -->
After."""
    made = with_tables(page)
    assert "| old |" not in made
    assert made.startswith(page.partition("| old |")[0])
    assert made.endswith("\n\n<!-- end of tables -->\nAfter.")
    assert "\n\n163 training images" in made
    assert "; mIoU over cat:\n\n| variant | PA % |" in made
    assert "| featuregan-1x, featuregan-2x | 163 | 61.2 | 6.8 | 0.010 | 0.10 | 1.00 |" in made
    assert with_tables(made) == made
    with pytest.raises(click.ClickException, match="no tables 'sizes', only variants, gans"):
        with_tables(page.replace("variants, gans", "sizes"))
