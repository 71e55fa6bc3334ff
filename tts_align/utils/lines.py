# SPDX-License-Identifier: Apache-2.0
"""Lines that stay in their file: found once from its beginning to its end, and read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tts_align.utils.readers import ReadError, byte_lines, parse_json

_MARK = b"\xef\xbb\xbf"


class PlacedLine(NamedTuple):
    """A line of a file.

    Args:
        number: from 1.
        offset: of its first byte that counts; a byte order mark does not.
        content: with its line end.
    """

    number: int
    offset: int
    content: bytes


def placed_lines(path: Path) -> Iterator[PlacedLine]:
    """Each line that is not blank, with its place.

    Args:
        path: of the file.

    Raises:
        ReadError: the file cannot be read, or holds a line of a length that no row has.
    """
    offset = len(_MARK) if _is_marked(path) else 0
    for number, content in byte_lines(path):
        if content.strip():
            yield PlacedLine(number, offset, content)
        offset += len(content)


def line_at(path: Path, offset: int) -> bytes:
    """The line that begins at this byte of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.readline()


def row_of(content: bytes, where: str | Path) -> dict[str, Any]:
    """The object that a line in JSON holds.

    Args:
        content: of the line.
        where: what errors call it.

    Raises:
        ReadError: it holds something else.
    """
    row = parse_json(content, where)
    if not isinstance(row, dict):
        raise ReadError(where, f"expected an object with columns, got {type(row).__name__}")
    return row


def _is_marked(path: Path) -> bool:
    """Whether a file begins with a byte order mark."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK
