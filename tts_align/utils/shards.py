# SPDX-License-Identifier: Apache-2.0
"""Results that survive a kill: every process appends lines to a shard of its own, and the shards become one file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from tts_align.utils.files import json_line, naming, write_json_lines
from tts_align.utils.lazy import Lazy
from tts_align.utils.readers import ReadError, byte_lines, parse_json

KEY = "made_with"
"""Column that holds the digest of the settings a row was made with."""
Row = dict[str, Any]


def digest(*settings: object) -> str:
    """A short name for settings: equal if and only if all of them are."""
    return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()


def listed_digest(*settings: object, rows: Iterable[object]) -> str:
    """The same digest of settings and a list of rows, without the list.

    >>> listed_digest("a", rows=iter([1, 2])) == digest("a", [1, 2])
    True
    """
    found = hashlib.blake2b(f"({', '.join(map(repr, settings))}, [".encode(), digest_size=8)
    for number, row in enumerate(rows):
        found.update(f"{', ' if number else ''}{row!r}".encode())
    found.update(b"])")
    return found.hexdigest()


def streamed_digest(*settings: object) -> str:
    """The same digest; what lists, lazy ones too, and mappings hold is looked at member by member, not put together.

    >>> streamed_digest("a", [1, 2], {"b": 3}) == digest("a", [1, 2], {"b": 3})
    True
    """
    found = hashlib.blake2b(b"(", digest_size=8)
    for number, one in enumerate(settings):
        found.update(b", " if number else b"")
        for words in _in_words(one):
            found.update(words.encode())
    found.update(b",)" if len(settings) == 1 else b")")
    return found.hexdigest()


def _in_words(one: object) -> Iterator[str]:
    if isinstance(one, list | Lazy):
        yield "["
        yield from (f"{', ' if number else ''}{part!r}" for number, part in enumerate(one))
        yield "]"
    elif isinstance(one, Mapping):
        yield "{"
        yield from (f"{', ' if number else ''}{key!r}: {part!r}" for number, (key, part) in enumerate(one.items()))
        yield "}"
    else:
        yield repr(one)


class KeptRows(Mapping[str, Row]):
    """Finished rows by their ids; they stay in their files, and are read when they are asked for.

    Args:
        ids: all rows there will be, in their order.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        self._numbers = {name: number for number, name in enumerate(ids)}
        self._file = np.full(len(ids), -1, np.int32)
        self._offset = np.zeros(len(ids), np.int64)
        self._length = np.zeros(len(ids), np.int64)
        self._files: list[tuple[Path, IO[bytes]]] = []

    def __len__(self) -> int:
        """How many are there."""
        return int((self._file >= 0).sum())

    def __iter__(self) -> Iterator[str]:
        """Ids of those that are there, in order."""
        return (self._ids[number] for number in np.flatnonzero(self._file >= 0).tolist())

    def __contains__(self, name: object) -> bool:
        """Whether a row is there."""
        number = self._numbers.get(name)  # type: ignore[call-overload]
        return number is not None and bool(self._file[number] >= 0)

    def __getitem__(self, name: str) -> Row:
        """A row, read from its file."""
        number = self._numbers[name]
        if self._file[number] < 0:
            raise KeyError(name)
        path, file = self._files[self._file[number]]
        # Unbuffered: another line may have taken the place of a half one that was read before.
        file.seek(int(self._offset[number]))
        row = parse_json(_read_all(file, int(self._length[number])), path)
        if not isinstance(row, dict) or row.get("id") != name:
            raise ReadError(path, f"was changed while it was in use: expected the row {name!r}")
        return row

    @property
    def missing(self) -> list[str]:
        """Ids of the rows that are not there, in order."""
        return [self._ids[number] for number in np.flatnonzero(self._file < 0).tolist()]

    def note(self, file: int, offset: int, length: int, row: Row) -> None:
        """Remember where a row lies; what failed once may have worked since."""
        number = self._numbers.get(row["id"]) if isinstance(row.get("id"), str) else None
        if number is None:
            return
        if not row.get("error") or self._file[number] < 0:
            self._place(number, file, offset, length)

    def replace(self, file: int, offset: int, length: int, row: Row) -> None:
        """Remember a row that this process has made, whatever was there before."""
        self._place(self._numbers[row["id"]], file, offset, length)

    def _place(self, number: int, file: int, offset: int, length: int) -> None:
        self._file[number], self._offset[number], self._length[number] = file, offset, length

    def open(self, path: Path) -> int:
        """Number of a file; it stays open, and so readable after it is removed or replaced."""
        for number, (known, file) in enumerate(self._files):
            if known == path and _same_file(file, path):
                return number
        self._files.append((path, path.open("rb", buffering=0)))
        return len(self._files) - 1

    def __del__(self) -> None:
        for _, file in getattr(self, "_files", ()):
            file.close()


def _read_all(file: IO[bytes], length: int) -> bytes:
    """``length`` bytes, or as many as there are."""
    found = b""
    while len(found) < length and (more := file.read(length - len(found))):
        found += more
    return found


def _same_file(file: IO[bytes], path: Path) -> bool:
    one, other = os.fstat(file.fileno()), path.stat()
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


class Shards:
    """The rows of a command on their way to one file.

    Args:
        out: the final file. Shards lie in a directory beside it until it is complete.
        key: of the settings; rows made with others are never mixed with these.
        ids: all rows there will be, in their order.
        rank: number of this process.
        world: how many processes there are.
        overwrite: replace a final file made with other settings.

    Raises:
        ValueError: ``out`` holds rows made with other settings.
    """

    def __init__(
        self, out: Path, key: str, ids: Sequence[str], rank: int = 0, world: int = 1, overwrite: bool = False
    ) -> None:
        if len(set(ids)) != len(ids):
            twice = _twice(ids)
            raise ValueError(f"utterance {twice!r} would appear twice in {out}")
        self.out, self.key, self.ids, self.world = Path(out), key, list(ids), world
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.shard = self.folder / f"{key}-{rank}.jsonl"
        self.rows = KeptRows(self.ids)
        self._whole = False
        if self.out.exists():
            self._read(self.out)
            if not self.rows and not overwrite:
                raise ValueError(f"{out} was made with other settings or inputs: choose another file, or overwrite it")
        self.refresh()

    def refresh(self) -> None:
        """Read what all processes have written so far."""
        for path in sorted(self.folder.glob(f"{self.key}-*.jsonl")):
            self._read(path)

    def _read(self, path: Path) -> None:
        file, offset = self.rows.open(path), 0
        for number, line in byte_lines(path):
            start = offset + (3 if number == 1 and _marked(path) else 0)
            offset = start + len(line)
            if not line.strip() or not line.endswith(b"\n"):  # the writer of half a line was killed
                continue
            row = parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise ReadError(f"{path}:{number}", f"expected an object with columns, got {type(row).__name__}")
            if row.get(KEY) == self.key:
                self.rows.note(file, start, len(line), row)

    @property
    def missing(self) -> list[str]:
        """Rows that nobody has made yet, in order."""
        return self.rows.missing

    def append(self, rows: Iterable[Row]) -> None:
        """Add finished rows to this process's shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._whole:  # only an earlier process can have left half a line
            _drop_cut_line(self.shard)
            self._whole = True
        keyed = [row | {KEY: self.key} for row in rows]
        lines = [json_line(row).encode() for row in keyed]
        with naming(self.shard), self.shard.open("ab") as file:
            offset = file.seek(0, 2)
            file.write(b"".join(lines))
        place = self.rows.open(self.shard)
        for row, line in zip(keyed, lines, strict=True):
            self.rows.replace(place, offset, len(line), row)
            offset += len(line)

    def merge(self, barrier: Callable[[], None] | None = None, rank: int = 0) -> bool:
        """Write the final file once every row is there, and remove the shards.

        Args:
            barrier: waits for the other processes; without it whoever finds everything complete writes.
            rank: with a barrier process 0 writes.

        Returns:
            Whether the final file is complete; without a barrier other processes may still be at work.

        Raises:
            ValueError: rows are missing although all processes have ended.
        """
        if barrier is not None:
            barrier()
        self.refresh()
        missing = self.missing
        if not missing and (barrier is None or rank == 0):
            write_json_lines(self.out, (self.rows[name] for name in self.ids))
        if barrier is not None:
            barrier()  # before anything is raised: nobody waits for a process that has ended
        alone = self.world == 1 if barrier is None else rank == 0
        if missing and alone:
            raise ValueError(
                f"{self.out} is not complete: {len(missing)} of {len(self.ids)} rows are missing, {missing[0]} first. "
                f"All processes have ended, so {self.folder} must be one folder for all of them: give --out as an "
                "absolute path on a disk they share; on a slow network disk give the same command again"
            )
        if not missing and alone and self.folder.exists():
            shutil.rmtree(self.folder)
        return not missing


def _twice(ids: Sequence[str]) -> str:
    """The first id that appears again."""
    known: set[str] = set()
    return next(name for name in ids if name in known or known.add(name))  # type: ignore[func-returns-value]


def _marked(path: Path) -> bool:
    """Whether a file begins with a byte order mark, which is no part of its first line."""
    with path.open("rb") as file:
        return file.read(3) == b"\xef\xbb\xbf"


def _drop_cut_line(path: Path) -> None:
    """Cut off a last line that its writer did not finish."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        while end > 0:  # from behind, as the file may be large
            start = max(0, end - 2**16)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                file.truncate(start + at + 1)
                return
            end = start
        file.truncate(0)
