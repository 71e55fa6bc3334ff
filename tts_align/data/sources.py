# SPDX-License-Identifier: Apache-2.0
"""What a manifest may be made of: JSON lines, Parquet files, CosyVoice's shards, Kaldi-style folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tts_align.data import cosyvoice, kaldi
from tts_align.data.records import Fault, ManifestError, Raw
from tts_align.utils.readers import ReadError, byte_lines, parse_json

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

KINDS = (
    "a .jsonl or .parquet file, a directory of .parquet shards, CosyVoice's parquet_*.tar shards or a .list of them, "
    "or a Kaldi-style folder with wav.scp and text"
)
_PARQUET = (".parquet", ".tar")


def read_rows(path: Path, unprepared: bool = False) -> Iterator[Raw]:
    """Every row of a file or directory, not checked yet.

    Args:
        path: what holds the rows.
        unprepared: also give rows whose recordings lie inside the file.

    Raises:
        ManifestError: there is nothing of a known kind.
    """
    if path.is_dir():
        yield from _read_directory(path, unprepared)
    elif not path.is_file():
        raise ManifestError(path, [Fault(str(path), "expected a manifest, but there is no such file")])
    elif path.suffix in _PARQUET:
        yield from _read_parquet(path, unprepared)
    elif path.suffix == ".list":
        for where, shard, fault in cosyvoice.listed(path):
            if fault:
                yield Raw(where, None, fault)
            else:
                yield from _read_parquet(shard, unprepared)
    elif path.suffix == ".jsonl":
        yield from _read_lines(path)
    else:
        raise ManifestError(path, [Fault(str(path), f"expected {KINDS}, got {path.name!r}")])


def _read_directory(path: Path, unprepared: bool) -> Iterator[Raw]:
    shards = sorted([*path.glob("*.parquet"), *path.glob("parquet_*.tar")])
    if shards:
        for shard in shards:
            yield from _read_parquet(shard, unprepared)
    elif kaldi.is_folder(path):
        yield from kaldi.read_folder(path)
    else:
        raise ManifestError(path, [Fault(str(path), f"expected {KINDS}, found none of them in it")])


def _read_lines(path: Path) -> Iterator[Raw]:
    for number, line in byte_lines(path):  # bytes: text mode would also break lines at other separators
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Raw(where, parse_json(line, where))
        except ReadError as error:
            yield Raw(where, None, error.what)


def _read_parquet(path: Path, unprepared: bool) -> Iterator[Raw]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        yield Raw(str(path), None, f"not a Parquet file: {error}")
        return
    try:
        with file:
            yield from (
                cosyvoice.read_shard(file, path, unprepared) if cosyvoice.is_shard(file) else _read_ours(file, path)
            )
    except (ArrowException, OSError) as error:
        yield Raw(str(path), None, f"cannot be read to its end: {error}")


def _read_ours(file: ParquetFile, path: Path) -> Iterator[Raw]:
    number = 0
    for batch in file.iter_batches(4096):  # in pieces, so that a shard need not fit into memory twice
        for columns in batch.to_pylist():
            number += 1
            yield Raw(f"{path}:row {number}", columns)
