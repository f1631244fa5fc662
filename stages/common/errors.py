"""What a user can get wrong, as exceptions whose text is the one line that the user is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class ConfigError(Exception):
    """A parameter or an option is wrong; the command line exits with 2.

    Attributes
    ----------
    key
        The parameter, such as ``train_gan.batch_size``.
    expected, actual
        What was wanted there and what was met, where that can be said.
    """

    def __init__(self, key: str, message: str, *, expected: Any = None, actual: Any = None) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.expected = expected
        self.actual = actual


class DataError(Exception):
    """A file that the pipeline was given or made is wrong; the command line exits with 1.

    Attributes
    ----------
    path
        The file or folder.
    expected, actual
        What was wanted there and what was met, where that can be said.
    """

    def __init__(
        self, path: str | Path, message: str, *, expected: Any = None, actual: Any = None
    ) -> None:
        super().__init__(f"{path}: {message}")
        self.path = Path(path)
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes whole."""
        return _restore, (self.args, self.__dict__)


def _restore(args: tuple[Any, ...], attributes: dict[str, Any]) -> DataError:
    error = DataError.__new__(DataError, *args)
    error.__dict__.update(attributes)
    return error


class CollapseError(Exception):
    """A GAN's training was stopped because it collapsed; what it had reached is in the scratch folder."""


class DivergenceError(Exception):
    """A training was stopped because a loss was no finite number any more: nothing that it reached is of use."""
