"""The notebook runs from top to bottom on a project's own shards."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.imports import ROOT


@pytest.mark.slow
def test_the_notebook_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / "explore_features.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), (
        "commit the notebook without outputs"
    )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(project)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any(
        "plastic bottle" in str(output.get("data", {}).get("text/html", "")) for output in outputs
    )
