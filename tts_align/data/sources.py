# SPDX-License-Identifier: Apache-2.0
"""What a manifest may be made of: JSON lines, Parquet files, CosyVoice's shards, Kaldi-style folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tts_align.data import cosyvoice, kaldi
from tts_align.data.places import shards
from tts_align.data.records import Fault, ManifestError, Raw
from tts_align.utils.readers import ReadError, byte_lines, parse_json

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow.parquet import ParquetFile

KINDS = (
    "a .jsonl or .parquet file, a directory of .parquet shards, CosyVoice's parquet_*.tar shards or a .list of them, "
    "or a Kaldi-style folder with wav.scp and text"
)
_PARQUET = (".parquet", ".tar")
MAX_VALUES = 2**18
"""Numbers in one list of a row, three hours of speech tokens; more come from a file that is none of rows."""
_VALUES_AT_ONCE = 2**24
_TOO_MANY = f"more than {MAX_VALUES:,}: is it a file of rows?"


@dataclass(frozen=True)
class Block:
    """Rows of a Parquet file as columns.

    Args:
        name: of the file.
        first: number of its first row in the file, from 1.
        batch: the columns.
    """

    name: str
    first: int
    batch: RecordBatch


def read_rows(path: Path | str, unprepared: bool = False) -> Iterator[Raw]:
    """Every row of a file or directory, not checked yet; see :func:`read_blocks`."""
    for one in read_blocks(path, unprepared):
        if isinstance(one, Raw):
            yield one
            continue
        for number, columns in enumerate(one.batch.to_pylist(), start=one.first):
            yield Raw(f"{one.name}:row {number}", columns)


def read_blocks(path: Path | str, unprepared: bool = False) -> Iterator[Raw | Block]:
    """Every row of a manifest, not checked yet, as columns where the file holds columns.

    Args:
        path: what holds the rows: here, or a URL or a pattern of names.
        unprepared: also give rows whose recordings lie inside the file.

    Raises:
        ManifestError: there is nothing of a known kind.
    """
    if isinstance(path, str):
        for one in shards(path):
            with one.open() as file:
                yield from (
                    _read_lines(one.name, file)
                    if one.name.endswith(".jsonl")
                    else _read_parquet(one.name, unprepared, file)
                )
    elif path.is_dir():
        yield from _read_directory(path, unprepared)
    elif not path.is_file():
        raise ManifestError(path, [Fault(str(path), "expected a manifest, but there is no such file")])
    elif path.suffix in _PARQUET:
        yield from _read_parquet(str(path), unprepared)
    elif path.suffix == ".list":
        for where, shard, fault in cosyvoice.listed(path):
            if fault:
                yield Raw(where, None, fault)
            else:
                yield from _read_parquet(str(shard), unprepared)
    elif path.suffix == ".jsonl":
        yield from _read_lines(str(path))
    else:
        raise ManifestError(path, [Fault(str(path), f"expected {KINDS}, got {path.name!r}")])


def files_of(path: Path) -> list[Path]:
    """The files that a manifest here is made of; as many as can be told without reading them."""
    if path.suffix == ".list" and path.is_file():
        return [path, *(shard for _, shard, fault in cosyvoice.listed(path) if not fault)]
    if not path.is_dir():
        return [path] if path.is_file() else []
    return _shards_in(path) or (kaldi.files_of(path) if kaldi.is_folder(path) else [])


def _shards_in(path: Path) -> list[Path]:
    return sorted([*path.glob("*.parquet"), *path.glob("parquet_*.tar")])


def _read_directory(path: Path, unprepared: bool) -> Iterator[Raw | Block]:
    if found := _shards_in(path):
        for shard in found:
            yield from _read_parquet(str(shard), unprepared)
    elif kaldi.is_folder(path):
        yield from kaldi.read_folder(path)
    else:
        raise ManifestError(path, [Fault(str(path), f"expected {KINDS}, found none of them in it")])


def _read_lines(name: str, file: Any = None) -> Iterator[Raw]:
    for number, line in byte_lines(name, file):  # bytes: text mode would also break lines at other separators
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield Raw(where, parse_json(line, where))
        except ReadError as error:
            yield Raw(where, None, error.what)


def _read_parquet(name: str, unprepared: bool, opened: Any = None) -> Iterator[Raw | Block]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Pages are read as they are asked for: a group of a million rows need not fit into memory.
        file = ParquetFile(opened or name, buffer_size=2**20, pre_buffer=False)
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # the last of names of columns
        yield Raw(name, None, f"not a Parquet file: {error}")
        return
    rows: Iterable[Raw | Block]
    try:
        with file:
            most = max((_values_per_row(file, group) for group in range(file.num_row_groups)), default=0)
            if most > MAX_VALUES:
                rows = [Raw(name, None, f"holds {most:,} values for each row in a column, {_TOO_MANY}")]
            elif cosyvoice.is_shard(file):
                rows = cosyvoice.read_shard(file, Path(name), unprepared)
            else:
                rows = _read_ours(file, name, max(1, min(4096, _VALUES_AT_ONCE // max(most, 1))))
            yield from rows
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        yield Raw(name, None, f"cannot be read to its end: {error}")


def _read_ours(file: ParquetFile, name: str, at_once: int) -> Iterator[Raw | Block]:
    from pyarrow import ArrowInvalid

    first = 1
    for batch in file.iter_batches(at_once):  # in pieces, so that a shard need not fit into memory
        try:
            batch.validate(full=True)
            if max(map(_longest, batch.columns), default=0) > MAX_VALUES:
                yield from _row_by_row(name, first, batch)
            else:
                yield Block(name, first, batch)
        except ArrowInvalid:
            yield from _row_by_row(name, first, batch)
        first += batch.num_rows


def _values_per_row(file: ParquetFile, group: int) -> int:
    """Values of a group's fullest column for each row: a kilobyte of a file can stand for gigabytes of them."""
    found = file.metadata.row_group(group)
    fullest = max((found.column(number).num_values for number in range(found.num_columns)), default=0)
    return -(-fullest // max(found.num_rows, 1))


def _longest(column: Array) -> int:
    """Length of the longest list in a column, or in a part of it."""
    from pyarrow import compute, types

    if types.is_struct(column.type):
        return max(map(_longest, column.flatten()), default=0)
    if not (types.is_list(column.type) or types.is_large_list(column.type)):
        return 0
    return compute.max(compute.list_value_length(column)).as_py() or 0


def _row_by_row(name: str, first: int, batch: RecordBatch) -> Iterator[Raw]:
    """Rows of columns of which one holds what is no text, or a list that is longer than that of any row."""
    for row in range(batch.num_rows):
        where, one = f"{name}:row {first + row}", batch.slice(row, 1)
        try:
            longest = max(map(_longest, one.columns), default=0)
            if longest > MAX_VALUES:
                yield Raw(where, None, f"holds {longest:,} values in a column, {_TOO_MANY}")
            else:
                yield Raw(where, one.to_pylist()[0])
        except UnicodeDecodeError as error:
            yield Raw(where, None, f"holds text that is not UTF-8: {error}")
