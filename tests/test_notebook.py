"""Both notebooks run from top to bottom: on a project's own shards, and in a temporary folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.imports import ROOT

NOTEBOOKS = ROOT / "notebooks"
MOST_BYTES = 400_000  # of a notebook with its stored outputs


def execute(notebook: nbformat.NotebookNode, folder: Path) -> list[nbformat.NotebookNode]:
    """Run a notebook in a folder and return its outputs, none of which is an error."""
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    return outputs


def kinds(outputs: list[nbformat.NotebookNode]) -> list[str]:
    return [kind for output in outputs for kind in output.get("data", {})]


@pytest.mark.slow
def test_the_notebook_on_shards_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOKS / "explore_features.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), (
        "commit the notebook without outputs"
    )
    outputs = execute(notebook, project)
    assert kinds(outputs).count("image/png") == 2
    assert any(
        "plastic bottle" in str(output.get("data", {}).get("text/html", "")) for output in outputs
    )


@pytest.mark.slow
def test_the_quickstart_goes_from_a_labelled_folder_to_overlays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    outputs = execute(notebook, NOTEBOOKS)
    assert kinds(outputs).count("image/jpeg") == 2
    (work,) = tmp_path.glob("featuregan-*")
    assert len(list((work / "predictions" / "overlays").iterdir())) == 3
    (html,) = (
        output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})
    )
    assert "class-transfer-perturbed" in html
    test = json.loads((work / "metrics" / "baseline-0" / "test.json").read_text())
    assert test["miou"] > 0.65  # 0.74 where its outputs were made


def test_the_stored_outputs_of_the_quickstart_are_small_and_name_no_machine() -> None:
    path = NOTEBOOKS / "quickstart.ipynb"
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert kinds(outputs).count("image/jpeg") == 2
    assert kinds(outputs).count("text/html") == 1
    texts = [output.get("text", "") for output in outputs]
    assert "baseline-0: test PA" in "".join(texts)
    assert not [text for text in texts if "Warning" in text or "/site-packages/" in text]
    assert all(word not in path.read_text("utf-8") for word in ("/home/", "/tmp/", "\\u001b"))
