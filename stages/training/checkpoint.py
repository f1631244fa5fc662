"""The state of a running training in its scratch folder.

Nothing is unpickled: tensors are read with ``weights_only=True``.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from featurestore.files import atomic_file, writing
from stages.common.distributed import agree, all_equal, several_processes
from stages.common.errors import DataError

ASK_EVERY = 20  # steps; processes wait for each other when they agree on saving


class Checkpoint:
    """A training's state, so that a killed run resumes at its last saved step.

    It holds no random state: every random number is a function of seed, epoch, step and process.

    Parameters
    ----------
    folder
        One folder a run; its name must hold the digest of everything that the run depends on.
        Several machines that train together must all see it.
    minutes
        Least time between two saved states.
    main
        Whether this process saves.
    """

    def __init__(self, folder: Path, *, minutes: float, main: bool) -> None:
        self.path = folder / "checkpoint.pt"
        self.minutes = minutes
        self.main = main
        self.saved_at = time.monotonic()
        self._asked = 0

    def load(self) -> dict[str, Any] | None:
        """Return the last saved state, on the CPU, or None.

        Raises
        ------
        DataError
            When it is damaged, or differs between processes.
        """
        state: dict[str, Any] | None = None
        if self.path.is_file():
            try:
                state = torch.load(self.path, map_location="cpu", weights_only=True)
            except Exception as error:  # zip, pickle and OS errors
                reason = " ".join(str(error).split())[:100]
                message = f"cannot be read ({reason}); remove it to train from the start"
                raise DataError(self.path, message) from error
        if not all_equal(None if state is None else (len(state["history"]), state["step"])):
            message = "processes find different states here; set --scratch to a disk that all see"
            raise DataError(self.path, message)
        return state

    def due(self) -> bool:
        """Return whether to save now; the main process decides for all, which collect the state."""
        self._asked += 1
        if self.minutes and several_processes() and self._asked % ASK_EVERY:
            return False
        return agree(time.monotonic() - self.saved_at >= 60 * self.minutes)

    def save(self, **state: Any) -> None:
        """Save the state, whole or not at all, in the main process."""
        if not self.main:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(state, self.path)
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        """Remove the state, once the stage has written its results."""
        if self.main:
            shutil.rmtree(self.path.parent, ignore_errors=True)


def save_atomically(state: object, path: Path) -> None:
    """Write with ``torch.save``, whole or not at all."""
    with atomic_file(path) as file:
        torch.save(state, file)
