"""The curves that trainings leave."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def read_curves(live: Path) -> dict[str, pd.Series]:
    """DVCLive's curves by name, indexed by epoch."""
    folder = live / "plots" / "metrics"
    curves = {}
    for file in sorted(folder.rglob("*.tsv")):
        table = pd.read_csv(file, sep="\t", index_col="step")
        curves[file.relative_to(folder).with_suffix("").as_posix()] = table.iloc[:, -1]
    return curves
