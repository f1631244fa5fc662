"""Curves of trainings, as DVCLive writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

OF_A_GAN = ("discriminator/", "generator/", "monitor/")  # how names of its curves start


def read_curves(live: Path) -> dict[str, pd.Series]:
    """Read the curves of a DVCLive folder by name, indexed by epoch."""
    folder = live / "plots" / "metrics"
    return {
        file.relative_to(folder).with_suffix("").as_posix(): pd.read_csv(
            file, sep="\t", index_col="step"
        ).iloc[:, -1]
        for file in sorted(folder.rglob("*.tsv"))
    }


def trained_gan(names: Iterable[str]) -> bool:
    """Return whether a training with curves of these names trained a GAN."""
    return any(name.startswith(OF_A_GAN) for name in names)
