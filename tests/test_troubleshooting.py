"""The messages that docs/troubleshooting.md explains are those of the sources."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.imports import ROOT

HOLE = "…"
TABLE_ROW = re.compile(r"^\| ``(.+?)`` \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = TABLE_ROW.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
QUOTES = [message.strip() for message, _, _ in ROWS]


@cache
def texts() -> tuple[str, ...]:
    """Return every string in the sources, with … where a value is formatted into it."""
    found = set()
    for path in [
        *ROOT.glob("featurestore/**/*.py"),
        *ROOT.glob("stages/**/*.py"),
        ROOT / "pipeline.py",
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else HOLE
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return tuple(sorted(found))


def test_the_page_has_its_tables() -> None:
    assert len(QUOTES) > 20
    assert len(set(QUOTES)) == len(QUOTES)


def test_a_row_says_more_than_its_message() -> None:
    """A message that names cause and remedy has no row."""
    assert [row for row in ROWS for cell in row[1:] if cell in ("as it says", "the same")] == []


@pytest.mark.parametrize("quote", QUOTES)
def test_a_message_is_one_that_the_sources_raise(quote: str) -> None:
    fixed = [part.strip() for part in quote.split(HOLE) if part.strip(" ;,:.()")]
    assert sum(map(len, fixed)) >= 12, "too short to be found by"
    pattern = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), f"no source says this any more: {quote}"


def test_a_message_that_nobody_raises_is_found_out() -> None:
    with pytest.raises(AssertionError, match="no source says this"):
        test_a_message_is_one_that_the_sources_raise(
            "this mask has been eaten; find the … that did"
        )
