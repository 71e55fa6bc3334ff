# SPDX-License-Identifier: Apache-2.0
"""The table of a manifest: read and checked, or taken from where it was stored."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.data.parse import Rules
from tts_align.data.places import content
from tts_align.data.records import Fault, Faults
from tts_align.data.refused import Refused
from tts_align.data.sources import files_of, read_blocks
from tts_align.data.table.build import Batches, Builder, Found
from tts_align.data.table.columns import token_type
from tts_align.data.table.rows import RowTable
from tts_align.data.table.store import STORED_FROM_BYTES, alone, name_of, release
from tts_align.utils.files import scratch_beside, synced, write_json
from tts_align.utils.messages import say
from tts_align.utils.readers import ReadError, read_json_object

log = logging.getLogger(__name__)
_SETTLED_NS = 2 * 10**9
"""A file that was changed so shortly before it was looked at may change again without another time of change."""
_READ: OrderedDict[Hashable, tuple[RowTable, Found]] = OrderedDict()
"""Small manifests that this process has read: the fits of a contrastive pair read the same ones."""
_READ_KEPT = 4


def table_of(
    path: Path | str,
    rules: Rules,
    checks: tuple[object, ...],
    folder: Path | None = None,
    looked_elsewhere: Callable[[], bool] = lambda: False,
    refused: Refused | None = None,
) -> tuple[RowTable, Found]:
    """Rows of a manifest that are right, and what is wrong with the others.

    Args:
        path: of the manifest; see :func:`~tts_align.data.places.locate`.
        rules: what rows are checked against.
        checks: the rules in words, which name the stored table.
        folder: where tables are stored; without it, or of a small manifest, the table is in memory.
        looked_elsewhere: whether other files were looked at, too: such a table cannot be kept.
        refused: notes every row that is left out; the manifest is read anew for it.
    """
    files = [] if isinstance(path, str) else files_of(path)
    small = not isinstance(path, str) and sum(file.stat().st_size for file in files) < STORED_FROM_BYTES
    if folder is None or small:
        if not small or refused is not None:
            return _in_memory(path, rules, refused)
        return _read_once(path, rules, (*checks, token_type(rules.codebook_size)), files, looked_elsewhere)
    digest = _remembered(path, files, folder)
    place = folder / f"rows-{name_of('rows', digest, checks, str(token_type(rules.codebook_size)))}.arrow"
    reused = refused is None
    found = _opened(place) if reused else None
    if found is None:
        with alone(place):  # others wait here, and find what the first one has made
            found = _opened(place) if reused else None
            found = found or _made(place, path, rules, refused, looked_elsewhere)
    return found


def _read_once(
    path: Path | str, rules: Rules, checks: Hashable, files: list[Path], looked_elsewhere: Callable[[], bool]
) -> tuple[RowTable, Found]:
    """A small manifest, from memory if this process has read it and its files have not changed."""
    states, seen = _states(files), time.time_ns()
    key = (str(path), checks, str(states))
    if key not in _READ:
        table, found = _in_memory(path, rules, None)
        if not _settled(states, seen) or looked_elsewhere():
            return table, found
        _READ[key] = table, found
    _READ.move_to_end(key)
    while len(_READ) > _READ_KEPT:
        _READ.popitem(last=False)
    table, found = _READ[key]
    return table, deepcopy(found)


def _in_memory(path: Path | str, rules: Rules, refused: Refused | None) -> tuple[RowTable, Found]:
    builder = Builder(rules, token_type(rules.codebook_size), refused)
    sink = pa.BufferOutputStream()
    found = builder.build(read_blocks(path, rules.unprepared), sink)
    table = _batches_of(pa.ipc.open_file(sink.getvalue()))
    again = builder.repeated(lambda rows: _ids(table, rows))
    if len(again):
        table = table.take(np.setdiff1d(np.arange(len(table)), again))
    return table, found


def _made(
    place: Path, path: Path | str, rules: Rules, refused: Refused | None, looked_elsewhere: Callable[[], bool]
) -> tuple[RowTable, Found]:
    """Build the table at its place."""
    say(f"{path}: checking its rows, once")
    token = token_type(rules.codebook_size)
    builder, scratch = Builder(rules, token, refused), scratch_beside(place, place.suffix)
    try:
        with pa.OSFile(str(scratch), "wb") as sink:
            found = builder.build(read_blocks(path, rules.unprepared), sink)
        table = RowTable.open(scratch)
        again = builder.repeated(lambda rows: _ids(table, rows))
        if len(again):
            _without(table, again, token, scratch)
            table = RowTable.open(scratch)
        if looked_elsewhere():
            return RowTable.open(scratch), found  # which stays readable without its name
        synced(scratch)
        os.replace(scratch, place)
        write_json(_beside(place), _as_json(found, place.stat().st_size))
        return RowTable.open(place), found
    finally:
        scratch.unlink(missing_ok=True)
        release()


def _without(table: RowTable, again: NDArray[np.int64], token: pa.DataType, scratch: Path) -> None:
    """Write a table anew, without some of its rows."""
    other = scratch_beside(scratch, scratch.suffix)
    keep = np.ones(len(table), bool)
    keep[again] = False
    with pa.OSFile(str(other), "wb") as sink:
        batches, start = Batches(token, sink), 0
        for batch in table.batches:
            batches.add(batch.filter(pa.array(keep[start : start + batch.num_rows])))
            start += batch.num_rows
        batches.close()
    os.replace(other, scratch)


def _ids(table: RowTable, rows: NDArray[np.int64]) -> list[str]:
    return table.take(rows).column("id").to_pylist()


def _batches_of(reader: Any) -> RowTable:
    return RowTable([reader.get_batch(number) for number in range(reader.num_record_batches)])


# --- what is known about a stored table ---


def _beside(place: Path) -> Path:
    return place.with_suffix(".json")


def _opened(place: Path) -> tuple[RowTable, Found] | None:
    """A table that is there, whole; a damaged one is made anew."""
    if not _beside(place).is_file() or not place.is_file():
        return None
    try:
        known = read_json_object(_beside(place))
        if known.pop("bytes") != place.stat().st_size:
            raise ReadError(place, "has another size than when it was written")
        return RowTable.open(place), _from_json(known)
    except (ReadError, pa.ArrowException, OSError, TypeError, KeyError) as error:
        log.warning("%s is damaged and is made anew: %s", place, error)
        return None


def _as_json(found: Found, size: int) -> dict[str, Any]:
    values = {name: value for name, value in vars(found).items() if name not in ("faults", "unsure")}
    values |= {"ignored": sorted(found.ignored), "bytes": size}
    for name in ("faults", "unsure"):
        faults: Faults = getattr(found, name)
        values[name] = {"total": faults.total, "first": [asdict(fault) for fault in faults]}
    return values


def _from_json(values: dict[str, Any]) -> Found:
    for name in ("faults", "unsure"):
        faults = Faults([Fault(**one) for one in values[name]["first"]])
        faults.total = values[name]["total"]
        values[name] = faults
    return Found(**values | {"ignored": set(values["ignored"])})


def _remembered(path: Path | str, files: list[Path], folder: Path) -> str:
    """Digest of a manifest's content; files that have not changed since it was taken are not read again."""
    if isinstance(path, str):
        return content(path, [])
    states = _states(files)
    note = folder / f"content-{name_of(str(path.absolute()))}.json"
    with suppress(OSError, ReadError, TypeError):
        known = read_json_object(note) if note.is_file() else {}
        if known.get("files") == states and _settled(states, known["seen"]):
            return str(known["digest"])
    seen, digest = time.time_ns(), content(path, files)
    write_json(note, {"files": states, "seen": seen, "digest": digest})
    return digest


def _states(files: list[Path]) -> list[list[Any]]:
    """Name, size, number and time of change of each file."""
    states = [(file, file.stat()) for file in files]
    return [[str(file.absolute()), state.st_size, state.st_ino, state.st_mtime_ns] for file, state in states]


def _settled(states: list[list[Any]], seen: int) -> bool:
    """Whether another change would have another time of change; false of no files."""
    return bool(states) and all(int(state[-1]) + _SETTLED_NS < seen for state in states)
