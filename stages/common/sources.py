"""Source files of the project that a module imports."""

from __future__ import annotations

import ast
import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """Describe this code's commit, with ``-dirty`` after changes; empty outside a checkout."""
    # An installed copy has no .git: a repository around it is another project's.
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def file_of(module: str) -> Path | None:
    """Find the project's file of a dotted module name; None for modules of other packages."""
    base = ROOT.joinpath(*module.split("."))
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)


def imported_modules(path: Path) -> set[str]:
    """List the dotted names that a file imports, in functions too, but not for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in for_types:
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update([node.module or "", *filter(file_of, members)])
    return names


def imported_sources(module: str) -> list[Path]:
    """List the project's files that importing ``module`` reads, packages' ``__init__`` included."""
    sources: set[Path] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        for depth in range(1, len(parts) + 1):
            path = file_of(".".join(parts[:depth]))
            if path is not None and path not in sources:
                sources.add(path)
                waiting.extend(imported_modules(path))
    return sorted(sources)


def imports_digest(module: str) -> str:
    """Compute the sha256 of all sources that a module imports."""
    sha = hashlib.sha256()
    for path in imported_sources(module):
        sha.update(path.read_bytes())
    return sha.hexdigest()
