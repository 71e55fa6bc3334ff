# SPDX-License-Identifier: Apache-2.0
"""CosyVoice's training shards: Parquet files, often named ``parquet_000000000.tar``, with columns of their own.

A shard holds whole recordings (``audio_data``) beside a few kilobytes of everything else. They are read only by
:func:`read_recordings`, so that training on speech tokens never touches them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tts_align.data.records import Raw, located
from tts_align.utils.audio import AudioError
from tts_align.utils.readers import read_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ALWAYS = frozenset({"utt", "text", "spk"})
"""Columns of every shard."""
TOKENS, REJECTED, AUDIO = "speech_token", "reject_speech_token", "audio_data"
_WANTED = (*sorted(ALWAYS), TOKENS, REJECTED, "instruct", "utt_embedding", "spk_embedding")
_PLACE = re.compile(r"(.+):row (\d+)", re.DOTALL)


def is_shard(file: ParquetFile) -> bool:
    """Whether a Parquet file has CosyVoice's columns."""
    names = set(file.schema_arrow.names)
    return names >= ALWAYS and bool(names & {TOKENS, AUDIO})


def listed(path: Path) -> Iterator[tuple[str, Path, str]]:
    """Place, path and fault of each line of a ``data.list``.

    A path that is not absolute starts from the list's folder or, as CosyVoice writes it, from where the command runs.
    """
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if name := line.strip():
            shard = located(name, path.parent)
            yield f"{path}:{number}", shard, "" if shard.is_file() else f"there is no shard {shard}"


def read_shard(file: ParquetFile, path: Path, unprepared: bool = False) -> Iterator[Raw]:
    """The rows of a shard, in the columns of our manifests.

    Args:
        file: the shard.
        path: its name.
        unprepared: instead of refusing rows without speech tokens, give every row's recording as ``audio``, by the
            name under which :func:`read_recordings` finds it.
    """
    names = set(file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(4096, columns=[name for name in _WANTED if name in names]):
        for columns in batch.to_pylist():
            number += 1
            where = f"{path}:row {number}"
            audio = where if unprepared and AUDIO in names else ""
            if audio or columns.get(TOKENS) is not None:
                yield Raw(where, _ours(columns, audio))
            elif AUDIO in names:
                yield Raw(where, None, "has a recording but no speech_token: make them with `tts-align prepare`")
            else:
                yield Raw(where, None, "has neither speech_token nor audio_data")


def _ours(columns: dict[str, Any], audio: str) -> dict[str, Any]:
    """One row under our names; a rejected utterance makes a pair of it."""
    row = {"id": columns["utt"], "text": columns["text"], "speaker": columns["spk"]}
    row["instruct"] = columns.get("instruct")
    row["speaker_vector"] = columns.get("utt_embedding") or columns.get("spk_embedding")
    speech = columns.get(TOKENS)
    # An empty list is how CosyVoice marks a recording that it did not encode.
    sound = {"speech": speech or None, "audio": audio} if audio else {"speech": speech}
    rejected = columns.get(REJECTED)
    return row | (sound if rejected is None else {"pair": {"chosen": sound, "rejected": rejected}})


def is_place(audio: str) -> bool:
    """Whether ``audio`` names a row of a shard rather than a file."""
    return _PLACE.fullmatch(audio) is not None


def shard_of(place: str) -> Path:
    """The shard in which a recording lies."""
    return Path(_split(place)[0])


def _split(place: str) -> tuple[str, int]:
    match = _PLACE.fullmatch(place)
    assert match is not None, place
    return match[1], int(match[2])


class NoRecording(AudioError):
    """A row of a shard without its recording, which only matters if something is still to be heard."""


def read_recordings(places: Sequence[str]) -> Iterator[tuple[str, bytes | AudioError]]:
    """Content of the sound files inside shards, or why there is none.

    Args:
        places: as ``audio`` of unprepared rows names them; those of one shard together and in its order.
    """
    from pyarrow.parquet import ParquetFile

    for shard, group in groupby(map(_split, places), key=lambda place: place[0]):
        wanted = {row for _, row in group}
        with ParquetFile(shard) as file:
            first = 1
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                here = sorted(wanted.intersection(range(first, first + count)))
                if here:
                    yield from _in_row_group(file, number, [row - first for row in here], here, shard)
                first += count


def _in_row_group(
    file: ParquetFile, number: int, offsets: Sequence[int], rows: Sequence[int], shard: str
) -> Iterator[tuple[str, bytes | AudioError]]:
    """Recordings of some rows; a few are held at a time, for a row group may hold a thousand."""
    from pyarrow import ArrowException

    places = deque(f"{shard}:row {row}" for row in rows)
    wanted = set(offsets)
    try:
        for offset, value in enumerate(_values(file, number)):
            if offset in wanted:
                content = value.as_py()
                name = places.popleft()
                yield name, NoRecording(name, "has no recording") if content is None else content
    except (ArrowException, OSError) as error:  # pages are damaged, and whatever comes after them is lost
        yield from ((name, AudioError(name, f"the shard cannot be read here: {error}")) for name in places)


def _values(file: ParquetFile, number: int) -> Iterator[Any]:
    for batch in file.iter_batches(16, row_groups=[number], columns=[AUDIO]):
        yield from batch.column(0)
