"""Errors that a user can mend, as exceptions whose text is the one line that the user is shown."""

from __future__ import annotations

from pathlib import Path

from featurestore.errors import OneLineError


class ConfigError(OneLineError):
    """A parameter or an option is wrong; the command line exits with 2.

    Attributes
    ----------
    key
        The parameter, such as ``train_gan.batch_size``.
    """

    def __init__(
        self, key: str, message: str, *, expected: object = None, actual: object = None
    ) -> None:
        super().__init__(key, message, expected=expected, actual=actual)
        self.key = key


class DataError(OneLineError):
    """A file that the pipeline was given or made is wrong; the command line exits with 1.

    Attributes
    ----------
    path
        The file or folder.
    """

    def __init__(
        self, path: str | Path, message: str, *, expected: object = None, actual: object = None
    ) -> None:
        super().__init__(path, message, expected=expected, actual=actual)
        self.path = Path(path)


class CollapseError(Exception):
    """A GAN's training stopped because it collapsed; its last state is in the scratch folder."""


class DivergenceError(Exception):
    """A training stopped because a loss was not finite; its networks are of no use."""
