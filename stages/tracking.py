"""The numbers of a training, one row an epoch, in DVCLive and TensorBoard through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from scmrepo.exceptions import SCMError
from torch import Tensor

from stages.errors import ConfigError

TRACKERS = ("dvclive", "tensorboard")


class History:
    """Writes rows to the trackers, and keeps them so that a resumed run can write them anew.

    Parameters
    ----------
    accelerator
        Made with ``log_with=TRACKERS`` and a ``project_dir`` for TensorBoard.
    name
        Of the run.
    live
        Folder of DVCLive's ``metrics.json`` and ``plots``; emptied first.
    rows
        Rows of the epochs that a resumed run has behind it.

    Raises
    ------
    ConfigError
        In a git repository without a commit.
    """

    def __init__(self, accelerator: Accelerator, name: str, *, live: Path, rows: list[dict[str, float]]) -> None:
        self.accelerator = accelerator
        self.rows: list[dict[str, float]] = []
        options = {"dir": str(live), "dvcyaml": None, "report": None, "save_dvc_exp": False, "monitor_system": False}
        try:
            accelerator.init_trackers(name, init_kwargs={"dvclive": options})
        except SCMError as error:
            message = f"DVCLive cannot record this run ({error}); commit something first, or train outside of a git repository"
            raise ConfigError("git", message) from error
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, float]) -> None:
        """Append one epoch's numbers."""
        self.accelerator.log(dict(row), step=len(self.rows))
        self.rows.append(dict(row))


class Means:
    """Running means of scalars on their device: nothing waits for the device until the end of an epoch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add one step's values."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def result(self) -> dict[str, float]:
        """The means."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}
