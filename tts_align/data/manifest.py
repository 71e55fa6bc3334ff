# SPDX-License-Identifier: Apache-2.0
"""Reading manifests, whatever holds them, and writing them as JSON lines or Parquet."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tts_align.data.parse import Rules
from tts_align.data.places import locate
from tts_align.data.records import Fault, Manifest, ManifestError, Row, Sound
from tts_align.data.records import folder as start_of
from tts_align.data.refused import Refused
from tts_align.data.table.read import table_of
from tts_align.utils.files import written_atomically

log = logging.getLogger(__name__)
_ROWS_OF_A_GROUP = 16384
"""Rows that are written to Parquet together."""


def read_manifest(
    path: str | Path,
    on_bad_row: Literal["stop", "drop"] = "stop",
    codebook_size: int | None = None,
    check_audio: bool | Literal["needed"] = True,
    unprepared: bool = False,
    desirable_stars: float | None = None,
    folder: Path | None = None,
    refused: Refused | None = None,
) -> Manifest:
    """Read a manifest once, and check every row of it.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file, a directory of Parquet shards, or a ``demo:`` name; CosyVoice's shards,
            one, a directory or a ``data.list`` of them, and Kaldi-style folders are manifests too; so are a pattern of
            file names and a URL that fsspec can open.
        on_bad_row: ``stop`` raises one error that counts the faults and names the first hundred, ``drop`` leaves the
            rows out and does the same.
        codebook_size: size of the codebook, if known; speech tokens beyond it are faults.
        check_audio: look at each recording's header; ``needed``: only where there are no speech tokens.
        unprepared: take what only ``tts-align prepare`` can use: recordings inside shards, which
            :func:`~tts_align.data.cosyvoice.read_recordings` reads, and prompts without speech tokens.
        desirable_stars: number of stars from which on a row is desirable, for labels that are stars.
        folder: where the checked rows of a large manifest are stored, to be looked at from there by all processes and
            by later calls; in memory by default.
        refused: notes every row that is left out; the manifest is read anew for it.

    Raises:
        ManifestError: there are faults and ``on_bad_row`` is ``stop``, or nothing is left, or labels may be stars and
            nothing says how many are desirable: then 1 may be the best or the worst.
    """
    path = locate(path)
    audio = _AudioCheck(start_of(path))
    rules = Rules(
        codebook_size,
        audio if check_audio else Rules().audio_fault,
        unprepared,
        desirable_stars,
        check_audio == "needed",
    )
    checks = (codebook_size, check_audio, unprepared, desirable_stars)
    rows, found = table_of(path, rules, checks, folder, lambda: bool(audio.known), refused)
    if found.unsure.total:
        raise ManifestError(path, found.unsure, hint="no row is taken until it is known what they mean")
    if found.faults.total and (on_bad_row == "stop" or not len(rows)):
        raise ManifestError(path, found.faults)
    if not len(rows):
        raise ManifestError(path, [Fault(str(path), "expected at least one row, got none")])
    if desirable_stars is not None and not found.starred:
        log.warning("%s: desirable_stars has no effect: none of its labels is a number of stars", path)
    if found.ignored:
        log.warning("%s: columns that are not known are ignored: %s", path, ", ".join(sorted(found.ignored)))
    if found.bad:
        shown = "\n".join(line.removeprefix("  ") for line in found.faults.lines())
        log.warning("%s: %d of %d rows are left out:\n%s", path, found.bad, found.bad + len(rows), shown)
    return Manifest(path, rows, found.faults, found.bad, tuple(sorted(found.ignored)))


class _AudioCheck:
    """Says what is wrong with a recording; each file is looked at once."""

    def __init__(self, start: Path) -> None:
        self.start = start
        self.known: dict[str, str | None] = {}

    def __call__(self, audio: str) -> str | None:
        if audio not in self.known:
            self.known[audio] = self._look(self.start / audio)
        return self.known[audio]

    def _look(self, path: Path) -> str | None:
        if not path.is_file():
            return f"there is no recording {path}"
        import soundfile  # takes a moment, and most manifests hold speech tokens

        try:
            return None if soundfile.info(path).frames else f"the recording {path} is empty"
        except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
            return f"cannot read the recording {path}: {error}"


def write_manifest(rows: Iterable[Row], path: str | Path) -> Path:
    """Write rows so that :func:`read_manifest` gives them back; the file appears whole or not at all.

    Args:
        rows: what to write.
        path: ends in ``.jsonl`` or ``.parquet``, which decides the format.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"expected a name that ends in .jsonl or .parquet, got {path.name!r}")
    with written_atomically(path) as scratch:
        (_write_lines if path.suffix == ".jsonl" else _write_parquet)(rows, scratch)
    return path


def to_dict(row: Row) -> dict[str, Any]:
    """The row as one line of a manifest: columns without content are left out."""
    columns: dict[str, Any] = {"id": row.id, "text": row.text, "language": row.language, "speaker": row.speaker}
    columns |= {"speech": list(row.speech), "audio": row.audio, "scores": dict(row.scores), "notes": dict(row.notes)}
    columns |= {"instruct": row.instruct, "prompt_text": row.prompt_text, "prompt_speech": list(row.prompt_speech)}
    columns |= {"prompt_audio": row.prompt_audio, "speaker_vector": list(row.speaker_vector)}
    columns |= {"attributes": dict(row.attributes), "transcript": row.transcript}
    columns["spans"] = [
        {"start": s.start, "end": s.end, "right": list(s.right), "wrong": list(s.wrong)} for s in row.spans
    ]
    columns = {name: value for name, value in columns.items() if value}
    if row.desirable is not None:
        columns["label"] = row.desirable
    if row.pair is not None:
        columns["pair"] = {"chosen": _side(row.pair.chosen), "rejected": _side(row.pair.rejected)}
    return columns


def _side(sound: Sound) -> list[int] | str | dict[str, Any]:
    if sound.speech and sound.audio:
        return {"speech": list(sound.speech), "audio": sound.audio}
    return list(sound.speech) or sound.audio


def _write_lines(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(to_dict(row), ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(rows: Iterable[Row], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    string, codebook_size, words = pa.string(), pa.list_(pa.int32()), pa.list_(pa.string())
    sound = pa.struct({"speech": codebook_size, "audio": string})
    schema = pa.schema(
        {
            **dict.fromkeys(("id", "text", "language", "speaker"), string),
            "speech": codebook_size,
            "audio": string,
            "label": pa.bool_(),
            "pair": pa.struct({"chosen": sound, "rejected": sound}),
            "spans": pa.list_(pa.struct({"start": pa.int32(), "end": pa.int32(), "right": words, "wrong": words})),
            "scores": pa.map_(string, pa.float64()),
            "notes": pa.map_(string, string),
            **dict.fromkeys(("instruct", "prompt_text", "transcript"), string),
            "prompt_speech": codebook_size,
            "prompt_audio": string,
            "speaker_vector": pa.list_(pa.float64()),
            "attributes": pa.map_(string, pa.struct({"word": string, "number": pa.float64()})),
        }
    )
    rest = iter(rows)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(islice(rest, _ROWS_OF_A_GROUP)):
            if wrong := [row.id for row in some if not all(map(math.isfinite, _numbers(row)))]:
                named = ", ".join(wrong[:10])
                raise ValueError(f"expected finite scores, attributes and vectors, got others in rows {named}")
            writer.write_table(pa.Table.from_pylist([_to_arrow(row) for row in some], schema=schema))


def _to_arrow(row: Row) -> dict[str, Any]:
    columns = to_dict(row)
    if row.pair is not None:  # a column has one type, so both sides are written in full
        columns["pair"] = {
            name: {"speech": list(side.speech) or None, "audio": side.audio or None}
            for name, side in (("chosen", row.pair.chosen), ("rejected", row.pair.rejected))
        }
    columns["attributes"] = {
        name: {"word" if isinstance(value, str) else "number": value} for name, value in row.attributes.items()
    }
    return columns | {name: list(columns.get(name, {}).items()) for name in ("scores", "notes", "attributes")}


def _numbers(row: Row) -> Iterator[float]:
    """Every number that must be finite."""
    yield from row.scores.values()
    yield from row.speaker_vector
    yield from (value for value in row.attributes.values() if not isinstance(value, str))
