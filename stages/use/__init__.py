"""Use of trained models: one module a command, and :class:`Segmenter` for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.use.segmenter import Segmenter

__all__ = ["Segmenter"]


def __getattr__(name: str) -> type[Segmenter]:
    """Import :class:`Segmenter`, and PyTorch with it, at its first use: ``--help`` stays fast."""
    if name != "Segmenter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stages.use.segmenter import Segmenter

    return Segmenter
