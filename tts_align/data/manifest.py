# SPDX-License-Identifier: Apache-2.0
"""Reading and writing manifests: JSON lines, one Parquet file, or a directory of Parquet shards."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tts_align.assets import resolve
from tts_align.data.parse import Rules, parse
from tts_align.data.records import Fault, Manifest, ManifestError, Row, Sound, folder

log = logging.getLogger(__name__)


def read_manifest(
    path: str | Path,
    on_bad_row: Literal["stop", "drop"] = "stop",
    codes: int | None = None,
    check_audio: bool = True,
) -> Manifest:
    """Read a whole manifest and check every row of it.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file, a directory of Parquet shards, or a ``demo:`` name.
        on_bad_row: ``stop`` raises one error that names every fault, ``drop`` leaves the rows out and names them.
        codes: size of the codebook, if known; codes beyond it are faults.
        check_audio: look at each recording's header.

    Raises:
        ManifestError: there are faults and ``on_bad_row`` is ``stop``, or nothing is left.
    """
    path = resolve(path)
    rules = Rules(codes, _AudioCheck(folder(path)) if check_audio else Rules().audio_fault)
    rows: dict[str, Row] = {}
    places: dict[str, str] = {}
    faults: list[Fault] = []
    ignored: set[str] = set()
    bad = 0
    for number, (where, raw, broken) in enumerate(_read(path), start=1):
        row: Row | None = None
        wrong = [broken]
        if not broken:
            row, wrong, unknown = parse(raw, f"row-{number}", rules)
            ignored |= unknown
        if row is not None and (holder := places.get(row.id)):
            wrong, row = [f"id {row.id!r} is taken by {holder}"], None
        if row is None:
            bad += 1
            faults += [Fault(where, what) for what in wrong]
        else:
            rows[row.id], places[row.id] = row, where
    if faults and (on_bad_row == "stop" or not rows):
        raise ManifestError(path, faults)
    if not rows:
        raise ManifestError(path, [Fault(str(path), "expected at least one row, got none")])
    if ignored:
        log.warning("%s: columns that are not known are ignored: %s", path, ", ".join(sorted(ignored)))
    if bad:
        log.warning("%s: %d of %d rows are left out:\n%s", path, bad, bad + len(rows), "\n".join(map(str, faults[:20])))
    return Manifest(path, tuple(rows.values()), tuple(faults), bad, tuple(sorted(ignored)))


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
        import soundfile  # takes a moment, and most manifests hold codes

        try:
            return None if soundfile.info(path).frames else f"the recording {path} is empty"
        except (soundfile.LibsndfileError, OSError) as error:
            return f"cannot read the recording {path}: {error}"


def _read(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Each row of the file or files: where it stands, what it holds, why it cannot be read."""
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise ManifestError(path, [Fault(str(path), "expected a directory of .parquet shards, found none in it")])
        for shard in shards:
            yield from _read_parquet(shard)
    elif not path.is_file():
        raise ManifestError(path, [Fault(str(path), "expected a manifest, but there is no such file")])
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".jsonl":
        yield from _read_lines(path)
    else:
        what = f"expected a name that ends in .jsonl or .parquet, got {path.name!r}"
        raise ManifestError(path, [Fault(str(path), what)])


def _read_lines(path: Path) -> Iterator[tuple[str, Any, str]]:
    with path.open("rb") as file:  # bytes: text mode would also break lines at other separators
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), ""
            except ValueError as error:
                yield where, None, f"not JSON: {error}"


def _read_parquet(path: Path) -> Iterator[tuple[str, Any, str]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        yield str(path), None, f"not a Parquet file: {error}"
        return
    with file:
        number = 0
        for batch in file.iter_batches(4096):  # in pieces, so that a shard need not fit into memory twice
            for raw in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", raw, ""


def write_manifest(rows: Iterable[Row], path: str | Path) -> Path:
    """Write rows so that :func:`read_manifest` gives them back; the file appears whole or not at all.

    Args:
        rows: what to write.
        path: ends in ``.jsonl`` or ``.parquet``, which decides the format.
    """
    path = Path(path)
    rows = tuple(rows)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"expected a name that ends in .jsonl or .parquet, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        (_write_lines if path.suffix == ".jsonl" else _write_parquet)(rows, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def to_dict(row: Row) -> dict[str, Any]:
    """The row as one line of a manifest: columns without content are left out."""
    columns: dict[str, Any] = {"id": row.id, "text": row.text, "language": row.language, "speaker": row.speaker}
    columns |= {"speech": list(row.speech), "audio": row.audio, "scores": dict(row.scores), "notes": dict(row.notes)}
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


def _write_lines(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(to_dict(row), ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    wrong = [row.id for row in rows if not all(map(math.isfinite, row.scores.values()))]
    if wrong:
        raise ValueError(f"expected finite scores, got others in rows {', '.join(wrong[:10])}")
    string, codes, words = pa.string(), pa.list_(pa.int32()), pa.list_(pa.string())
    sound = pa.struct({"speech": codes, "audio": string})
    schema = pa.schema(
        {
            **dict.fromkeys(("id", "text", "language", "speaker"), string),
            "speech": codes,
            "audio": string,
            "label": pa.bool_(),
            "pair": pa.struct({"chosen": sound, "rejected": sound}),
            "spans": pa.list_(pa.struct({"start": pa.int32(), "end": pa.int32(), "right": words, "wrong": words})),
            "scores": pa.map_(string, pa.float64()),
            "notes": pa.map_(string, string),
        }
    )
    table = pa.Table.from_pylist([_to_arrow(row) for row in rows], schema=schema)
    parquet.write_table(table, path, compression="zstd")


def _to_arrow(row: Row) -> dict[str, Any]:
    columns = to_dict(row)
    if row.pair is not None:  # a column has one type, so both sides are written in full
        columns["pair"] = {
            name: {"speech": list(side.speech) or None, "audio": side.audio or None}
            for name, side in (("chosen", row.pair.chosen), ("rejected", row.pair.rejected))
        }
    return columns | {name: list(columns.get(name, {}).items()) for name in ("scores", "notes")}
