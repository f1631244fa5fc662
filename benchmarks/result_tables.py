"""Write the tables of docs/results/ from the committed result files.

    python -m benchmarks.result_tables

A page has a ``compare`` command and, below it, two comments that name the kinds of tables of
:func:`stages.studies.tables.sections`:

    <!-- tables: sizes, variants -->
    <!-- end of tables -->

The text between the comments is replaced by the tables of the last ``compare`` command above.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import click

from stages.commands.studies import compare as command
from stages.studies import compare as comparison
from stages.studies.tables import sections

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
COMMAND = r"^    python pipeline\.py compare (?P<arguments>(?:.*\\\n)*.*)$"
TABLES = r"^<!-- tables: (?P<kinds>.*) -->\n(?:.*\n)*?<!-- end of tables -->$"
PART = re.compile(f"{COMMAND}|{TABLES}", re.MULTILINE)


def with_tables(page: str) -> str:
    """Replace the tables of a page; paths in its commands are relative to the working folder."""
    arguments = ""

    def replace(part: re.Match[str]) -> str:
        nonlocal arguments
        if part["arguments"]:
            arguments = part["arguments"].replace("\\\n", " ")
            return part[0]
        kinds = part["kinds"]
        return f"<!-- tables: {kinds} -->\n\n{tables(arguments, kinds)}\n\n<!-- end of tables -->"

    return PART.sub(replace, page)


def tables(arguments: str, kinds: str) -> str:
    """Format tables of one ``compare`` command, each below its title."""
    by_kind = compared_sections(arguments)
    titled = []
    for kind in kinds.split(", "):
        if not by_kind.get(kind):
            shown = ", ".join(name for name in by_kind if by_kind[name])
            raise click.ClickException(f"compare {arguments}: no tables {kind!r}, only {shown}")
        for title, table in by_kind[kind]:
            without_name = title.rpartition(": ")[2]  # the command names the experiments
            titled.append(f"{textwrap.fill(without_name, 99)}:\n\n{table}")
    return "\n\n".join(titled)


@cache
def compared_sections(arguments: str) -> dict[str, list[tuple[str, str]]]:
    """Run one ``compare`` command and return its titles and tables by kind."""
    options = command.make_context("compare", shlex.split(arguments, comments=True)).params
    groups = comparison.read_groups(options["results"], options["seeds"])
    compared = comparison.compare(
        groups, options["classes"], options["baseline"], options["block_length"]
    )
    return sections(compared)


@click.command(help=__doc__)
def main() -> None:
    """Rewrite every page."""
    os.chdir(ROOT)
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        page.write_text(after, encoding="utf-8")
        click.echo(f"{page.relative_to(ROOT)}: {'unchanged' if after == before else 'rewritten'}")


if __name__ == "__main__":
    main()
