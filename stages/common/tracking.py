"""The numbers of a training, one row an epoch, in DVCLive and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stages.common.distributed import average_over_processes
from stages.common.errors import ConfigError, DivergenceError

TRACKERS = ("dvclive", "tensorboard")


class History:
    """Write rows to accelerate's trackers and keep them, so that a resumed run writes them again.

    Parameters
    ----------
    accelerator
        Made with ``log_with=TRACKERS`` and a ``project_dir`` for TensorBoard.
    name
        Name of the run.
    live
        Folder of DVCLive's ``metrics.json`` and ``plots``; emptied first.
    rows
        Rows of the epochs that a resumed run has finished.

    Raises
    ------
    ConfigError
        In a git repository without a commit.
    """

    def __init__(
        self, accelerator: Accelerator, name: str, *, live: Path, rows: list[dict[str, float]]
    ) -> None:
        from scmrepo.exceptions import SCMError  # of DVCLive, which only trainings import

        self.accelerator = accelerator
        self.rows: list[dict[str, float]] = []
        options = {
            "dir": str(live),
            "dvcyaml": None,
            "report": None,
            "save_dvc_exp": False,
            "monitor_system": False,
        }
        try:
            accelerator.init_trackers(name, init_kwargs={"dvclive": options})
        except SCMError as error:
            message = (
                f"DVCLive cannot record this run ({error}); commit something first, or train"
                " outside of a git repository"
            )
            raise ConfigError("git", message) from error
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, float]) -> None:
        """Append the numbers of an epoch."""
        self.accelerator.log(dict(row), step=len(self.rows))
        self.rows.append(dict(row))


class Means:
    """Mean scalars of an epoch, summed on their device, which is waited for only at the end.

    Parameters
    ----------
    state
        Sums of an epoch that an interrupted run has begun.
    """

    def __init__(self, state: Mapping[str, tuple[Tensor, Tensor | int]] | None = None) -> None:
        self._sums = {name: (total, count) for name, (total, count) in (state or {}).items()}

    def add(self, terms: Mapping[str, Tensor], *, finite_only: bool = False) -> None:
        """Add the values of a step; ``finite_only``: leave out those that are not finite."""
        for name, value in terms.items():
            value, (total, count) = value.detach().float(), self._sums.get(name, (None, 0))
            added: Tensor | int = 1
            if finite_only:
                added = value.isfinite().float()
                value = torch.where(value.isfinite(), value, 0.0)
            if total is not None:  # on the CPU only in the first step of a resumed run
                value = total.to(value.device) + value
            self._sums[name] = value, added + count

    def state(self, device: torch.device) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Return the sums, averaged over processes on ``device``; all processes must call it."""
        return {
            name: (
                average_over_processes(total.to(device)),
                average_over_processes(count.to(device)) if isinstance(count, Tensor) else count,
            )
            for name, (total, count) in self._sums.items()
        }

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over the steps of all processes.

        Raises
        ------
        DivergenceError
            When one is not finite.
        """
        names = list(self._sums)
        if not names:
            return {}
        means = torch.stack(
            [(total / count).to(accelerator.device) for total, count in self._sums.values()]
        )
        result = dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))
        for name, value in result.items():
            if not math.isfinite(value):
                raise DivergenceError(
                    f"the training diverges: {name} is {value}; lower the learning rate, or set"
                    " mixed_precision to 'no'"
                )
        return result
