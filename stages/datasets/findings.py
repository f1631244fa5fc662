"""Findings: what is doubtful in a data set, and does not stop prepare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One doubtful file, or one kind of annotation that was left out.

    Attributes
    ----------
    kind
        What is doubtful, in words that fit all findings of the kind, such as
        ``images with an EXIF orientation``; findings are counted by kind.
    path
        The file.
    message
        What was found in this file, and what to do about it.
    count
        Number of cases in the file.
    """

    kind: str
    path: Path
    message: str
    count: int = 1
