"""Text files as people's programs write them: UTF-8 or UTF-16, with or without a mark."""

from __future__ import annotations

import codecs
import csv
from pathlib import Path

from stages.common.errors import DataError


def read_text(path: Path, what: str, remedy: str = "") -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as PowerShell writes it.

    Parameters
    ----------
    path
        The file.
    what
        Its kind with an article, such as ``this id list``, for the error message.
    remedy
        For the error message: what to do about a file that cannot be opened.

    Raises
    ------
    DataError
        When it cannot be opened, or has another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{what} cannot be read ({error.strerror}); {remedy or 'correct the file'}"
        raise DataError(path, message) from error
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{what} is neither in UTF-8 nor in UTF-16 ({error}); save it as UTF-8"
        raise DataError(path, message) from error


def read_table(path: Path, what: str, column: str, example: str) -> list[dict[str, str]]:
    """Read a table below a line of column names, divided by commas, semicolons or tabs.

    Lines without a text are left out.

    Parameters
    ----------
    path, what
        The file, and its kind as in :func:`read_text`.
    column
        A column that the table must have, in small letters.
    example
        Such a line of column names, for the error message.

    Returns
    -------
    list of dict
        Texts without surrounding spaces, by column name in small letters; missing ones are empty.

    Raises
    ------
    DataError
        When the file cannot be read, or lacks the column.
    """
    lines = [line for line in read_text(path, what).splitlines() if line.strip(" ,;\t")]
    header = lines[0] if lines else ""
    mark = next((mark for mark in ";\t" if mark in header), ",")
    try:
        rows = [[text.strip() for text in row] for row in csv.reader(lines, delimiter=mark)]
    except csv.Error as error:
        raise DataError(path, f"{what} cannot be read ({error}); correct the file") from error
    names = [name.lower() for name in rows[0]] if rows else []
    if column not in names:
        message = f"{what} must begin with a line of column names such as `{example}`"
        raise DataError(path, f"{message}, found {header!r}", expected=column, actual=header)
    return [{**dict.fromkeys(names, ""), **dict(zip(names, row, strict=False))} for row in rows[1:]]
