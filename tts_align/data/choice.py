# SPDX-License-Identifier: Apache-2.0
"""From the rows of a manifest to the examples that are trained on; made once and stored where the rows are stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tts_align.batch import RowsWanted
from tts_align.data.examples import Arranged, Examples, SelectedUtterances, arrange
from tts_align.data.keyed import hex_key
from tts_align.data.records import Manifest, Row
from tts_align.data.select import Items, Selector, Usable
from tts_align.data.sound import FeatureExtractor
from tts_align.data.table.rows import RowTable
from tts_align.data.table.store import alone, name_of, read_table, release, write_table
from tts_align.data.texts import Texts
from tts_align.data.unlabelled import Unlabelled, settle_unlabelled
from tts_align.models.base.generation import Context
from tts_align.models.base.policy import CodecLM
from tts_align.utils.files import scratch_beside, synced, written_atomically

log = logging.getLogger(__name__)
_CHECKED = 4
"""Stored rows that are made anew and compared."""


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on, and how they are arranged.

    Args:
        wants: what the objective wants.
        unlabelled: what rows without a label are where others have one.
        paired_only: only rows that stand in pairs.
        flip_labels: the opposite labels.
        max_rows: number of rows of the manifest, drawn by the seed.
        bistream_share: share of long rows that are interleaved.
        seed: of every draw.
    """

    wants: RowsWanted
    unlabelled: Unlabelled = "stop"
    paired_only: bool = False
    flip_labels: bool = False
    max_rows: int | None = None
    bistream_share: float = 0.0
    seed: int = 0

    def selector(self, given: Sequence[Row]) -> Selector:
        """What can be used of a manifest."""
        rows = given if isinstance(given, RowTable) else RowTable.of(given)
        if self.max_rows is not None:
            kept = np.random.default_rng(self.seed).permutation(len(rows))[: self.max_rows]
            rows = rows.take(np.sort(kept))
        rows = settle_unlabelled(rows, self.wants.reads, self.unlabelled, self.paired_only)
        return Selector(rows, self.seed)

    def items(self, selector: Selector) -> Items:
        """What is trained on."""
        return selector.select(self.wants.reads, self.paired_only, self.flip_labels)

    def examples(self, rows: Sequence[Row], policy: CodecLM) -> tuple[Examples, Usable]:
        """Token rows, and how many rows each kind of objective could use.

        Args:
            rows: of the manifest, all of them with speech tokens.
            policy: knows how text becomes tokens.

        Raises:
            ValueError: nothing can be used, or an option has no effect.
        """
        identity = policy.text_identity
        if not isinstance(rows, RowTable) or rows.file is None or identity is None:
            selector = self.selector(rows)
            wants = self.wants
            items = self.items(selector)
            examples = Examples.of(
                items, policy, wants.mismatched, self.bistream_share, self.seed, utterances=wants.utterances
            )
            return examples, selector.usable(wants.readers)
        named = asdict(self) | {"wants": (str(self.wants.reads), self.wants.mismatched)}
        name = name_of(rows.file.name, sorted(named.items()), repr(policy.layout), identity)
        place = rows.file.with_name(f"examples-{name}.arrow")
        found = self._opened(rows, place, policy)
        if found is None:
            with alone(place):  # others wait here, and find what the first one has made
                found = self._opened(rows, place, policy) or self._made(rows, place, policy)
        return found

    def heard(
        self, rows: Sequence[Row], policy: CodecLM, extractor: FeatureExtractor, manifest: Manifest
    ) -> tuple[Examples, Usable]:
        """The same of recordings, whose speech tokens the training makes; their features are in memory."""
        selector, wants = self.selector(rows), self.wants
        items, recordings = extractor.extract(self.items(selector), manifest)
        share = self.bistream_share
        examples = Examples.of(items, policy, wants.mismatched, share, self.seed, utterances=wants.utterances)
        return replace(examples, recordings=recordings), selector.usable(wants.readers)

    def _made(self, rows: RowTable, place: Path, policy: CodecLM) -> tuple[Examples, Usable]:
        selector = self.selector(rows)
        items = self.items(selector)
        found = SelectedUtterances(items)
        text, first = found.texts()
        scratch = scratch_beside(_texts(place), place.suffix)
        try:
            with pa.OSFile(str(scratch), "wb") as sink:
                Texts.write(items.table, first, policy, sink)
            synced(scratch)
            scratch.replace(_texts(place))
        finally:
            scratch.unlink(missing_ok=True)
        texts = Texts.open(_texts(place))
        arranged = arrange(found, text, texts, policy.layout, self.wants.mismatched, self.bistream_share, self.seed)
        usable = selector.usable()
        meta = {"width": items.row.shape[1], "usable": {k: v for k, v in vars(usable).items() if k != "readers"}}
        meta["content"] = _content(_texts(place))
        with written_atomically(place) as beside:
            write_table(beside, _columns(items, arranged), meta)
        del selector, items, found, arranged, texts
        release()
        opened = self._opened(rows.reopened(), place, policy)
        assert opened is not None, place
        return opened

    def _opened(self, rows: RowTable, place: Path, policy: CodecLM) -> tuple[Examples, Usable] | None:
        """What was stored; what is damaged, or is not what the policy says today, is made anew."""
        if not place.is_file():
            return None
        try:
            batch, meta = read_table(place)
            if meta["content"] != _content(_texts(place)):
                raise ValueError("its texts were written for something else")
            texts = Texts.open(_texts(place))
            items, arranged = _from_columns(rows, batch, meta["width"])
            found = SelectedUtterances(items)
            examples = Examples.made(found, texts, arranged, policy.layout, self.wants.utterances)
            _check(examples, policy)
            return examples, Usable(**meta["usable"], readers=self.wants.readers)
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("%s cannot be used and is made anew: %s", place, error)
            return None


def _texts(place: Path) -> Path:
    return place.with_name(place.name.replace("examples-", "texts-", 1))


def _content(path: Path) -> list[int]:
    """What tells a whole file from one that was cut."""
    return [path.stat().st_size]


def _columns(items: Items, arranged: Arranged) -> dict[str, pa.Array]:
    count = items.row.size
    columns: dict[str, Any] = {
        "row": items.table.kept[items.row.ravel()],
        "side": items.side.ravel(),
        "desirable": items.desirable.ravel(),
        "text": arranged.text.astype(np.int32),
        "bistream": arranged.bistream,
    }
    arrays = {name: pa.array(values) for name, values in columns.items()} | {"key": _binary(arranged.key)}
    if len(arranged.partner):
        arrays |= {"partner": pa.array(arranged.partner), "partner_key": _binary(arranged.partner_key)}
        arrays["partner_bistream"] = pa.array(arranged.partner_bistream)
    assert all(len(one) == count for one in arrays.values())
    return arrays


def _from_columns(rows: RowTable, batch: pa.RecordBatch, width: int) -> tuple[Items, Arranged]:
    def numbers(name: str) -> NDArray[Any]:
        return np.asarray(batch.column(name).to_numpy(zero_copy_only=False))

    shaped = [numbers(name).reshape(-1, width) for name in ("row", "side", "desirable")]
    none: tuple[Any, ...] = np.zeros(0, np.int64), np.zeros(0, bool), np.zeros((0, 16), np.uint8)
    if "partner" in batch.schema.names:
        none = numbers("partner"), numbers("partner_bistream"), _bytes(batch.column("partner_key"))
    own = numbers("text").astype(np.int64), numbers("bistream"), _bytes(batch.column("key"))
    return Items(rows, *shaped), Arranged(*own, *none)


def _binary(keys: NDArray[np.uint8]) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(keys))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, buffer])


def _bytes(column: pa.FixedSizeBinaryArray) -> NDArray[np.uint8]:
    return np.frombuffer(column.buffers()[1], np.uint8)[: 16 * len(column)].reshape(-1, 16)


def _check(examples: Examples, policy: CodecLM) -> None:
    """Make a few rows anew, and compare.

    Raises:
        ValueError: the policy says something else today.
    """
    for number in range(0, len(examples.rows), max(1, len(examples.rows) // _CHECKED)):
        source = examples.sources[number]
        row = source.row
        fresh = policy.encode_text(row.text, Context(row.speaker, row.instruct, row.prompt_text, row.prompt_speech))
        stored = examples.rows[number]
        same = (fresh.text, fresh.prefix, fresh.prompt_speech) == (stored.text, stored.prefix, stored.prompt)
        same &= stored.speech == source.sound.speech
        if not same or policy.layout.key(stored) != hex_key(examples.keys[number]):
            raise ValueError("the policy reads the texts differently today")
