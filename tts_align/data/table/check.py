# SPDX-License-Identifier: Apache-2.0
"""Many raw rows checked at once, column by column.

What passes is exactly what :func:`~tts_align.data.parse.parse` would make of it. Rows in which something is unusual
are left to it, which also says what is wrong with them: here nothing is ever refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tts_align.data.columns import LANGUAGE, read_attributes, read_notes, read_scores, read_spans
from tts_align.data.labels import read_label, stars_of
from tts_align.data.parse import KNOWN, SPOKEN, Rules
from tts_align.data.table.arrays import (
    Mask,
    Tokens,
    any_in,
    as_array,
    chosen_of,
    either,
    fields_of,
    inner_of,
    is_list,
    is_words,
    listed,
    no_lists,
    plain,
    said,
    same_lists,
    tokens_of,
    valid,
)
from tts_align.data.table.columns import NONE, rest_of, schema

_WORDS = ("language", "speaker", "instruct", "transcript")
_READERS: Mapping[str, Callable[[Any, list[str]], Any]] = {
    "scores": read_scores, "notes": read_notes, "attributes": read_attributes
}  # fmt: skip
_SLOW = 2
"""Stands for a label that only its row's own check can judge."""


@dataclass
class Checked:
    """What became of a batch of raw rows.

    Args:
        passed: rows that are right.
        batch: those rows, in the columns of a table.
        starred: whether a label is a number of stars.
        ignored: columns that are not known.
    """

    passed: Mask
    batch: pa.RecordBatch
    starred: bool = False
    ignored: set[str] = field(default_factory=set)


class BatchCheck:
    """Checks batches of one manifest.

    Args:
        rules: see :class:`~tts_align.data.parse.Rules`.
        token: type of speech tokens in the table.
    """

    def __init__(self, rules: Rules, token: pa.DataType) -> None:
        self.rules, self.token = rules, token
        self._labels: dict[tuple[type, Any], int] = {}
        self._starred = False
        self._any_audio = rules.audio_fault is Rules().audio_fault

    def __call__(self, columns: Mapping[str, pa.Array | Sequence[Any]], slow: Mask, first: int) -> Checked:
        """Check raw rows.

        Args:
            columns: by name; words, lists of whole numbers and pairs as Arrow's arrays, the others as they are.
            slow: rows that are not to be checked here.
            first: number of the first row in the manifest, from 1; it names rows without an id.
        """
        count = len(slow)
        one = _One(columns, slow.copy(), count, self)
        text = one.text()
        made: dict[str, Any] = {"id": one.identity(first), "text": text}
        made |= {name: one.words(name) for name in _WORDS}
        one.languages(made["language"])
        label, starred = one.labels()
        made |= one.sounds(label) | one.prompt() | {"label": label, "speaker_vector": one.vectors()}
        made["rest"] = one.rest(text)
        ignored = one.unknown()
        passed = ~one.slow
        keep = pa.array(passed)
        kinds = schema(self.token)
        arrays = [as_array(made[kind.name], kind.type).filter(keep) for kind in kinds]
        arrays = [array.cast(kind.type) for array, kind in zip(arrays, kinds, strict=True)]
        return Checked(passed, pa.RecordBatch.from_arrays(arrays, schema=kinds), starred, ignored)

    def label(self, value: Any) -> int:
        """A label as a number, or that its row is to be looked at."""
        key = type(value), value
        try:
            if key not in self._labels:
                self._labels[key] = self._label(value)
            return self._labels[key]
        except TypeError:  # a list has no hash
            return _SLOW

    def _label(self, value: Any) -> int:
        try:
            found = read_label(value, self.rules.desirable_stars)
        except ValueError:
            return _SLOW
        return NONE if found is None else int(found)


@dataclass
class _One:
    """One batch while it is checked; ``slow`` collects the rows that are left to others."""

    columns: Mapping[str, Any]
    slow: Mask
    count: int
    check: BatchCheck

    def get(self, name: str) -> Any:
        """A column, or nothing if no row has it."""
        found = self.columns.get(name)
        return None if isinstance(found, pa.Array) and found.null_count == self.count else found

    def there(self, name: str) -> Mask:
        """Rows that have a column."""
        found = self.get(name)
        if found is None:
            return np.zeros(self.count, bool)
        if isinstance(found, pa.Array):
            return np.asarray(found.is_valid().to_numpy(zero_copy_only=False))
        return np.asarray([value is not None for value in found], bool)

    def words(self, name: str, absent: str | None = "") -> pa.Array:
        """A column of words; rows that hold something else are slow."""
        found = self.get(name)
        if found is None:
            return pa.nulls(self.count, pa.string()) if absent is None else pa.repeat(absent, self.count)
        if not is_words(found.type):
            self.slow |= self.there(name)
            return pa.repeat(absent or "", self.count)
        found = found.cast(pa.string())
        return found if absent is None else found.fill_null(absent)

    def languages(self, words: pa.Array) -> None:
        """Languages that are no code are left to their rows' own check."""
        coded = words.dictionary_encode()
        right = np.asarray([not one or bool(LANGUAGE.fullmatch(one)) for one in coded.dictionary.to_pylist()], bool)
        self.slow |= ~right[coded.indices.to_numpy(zero_copy_only=False)]

    def text(self) -> pa.Array:
        self.slow |= self.there("text") & self.there("prompt")
        text = pc.coalesce(self.words("text", None), self.words("prompt", None)).fill_null("")
        self.slow |= ~said(text)
        return text

    def identity(self, first: int) -> pa.Array:
        found = self.get("id")
        names = pa.array([f"row-{number}" for number in range(first, first + self.count)])
        if found is None:
            return names
        if pa.types.is_integer(found.type):
            return pc.coalesce(found.cast(pa.string()), names)
        found = pc.coalesce(self.words("id", None), names)
        self.slow |= np.asarray(pc.equal(found, "").to_numpy(zero_copy_only=False), bool)
        return found

    def labels(self) -> tuple[NDArray[np.int8], bool]:
        found = self.get("label")
        if found is None:
            return np.full(self.count, NONE, np.int8), False
        values = found.to_pylist() if isinstance(found, pa.Array) else found
        kinds = {type(value) for value in values}
        starred = not kinds <= {bool, type(None)} and any(stars_of(value) is not None for value in values)
        label = np.fromiter(map(self.check.label, values), np.int8, self.count)
        self.slow |= label == _SLOW
        return label, starred

    def tokens(self, name: str) -> Tokens:
        found = self.get(name)
        return tokens_of(None if found is None else found, self.count, self.check.rules.codebook_size)

    def _audio_right(self, audio: Any, spoken: Mask) -> tuple[pa.Array, Mask]:
        """Paths of recordings, and rows in which nothing has to be looked at."""
        if audio is None or audio.null_count == self.count:
            return pa.repeat("", self.count), np.ones(self.count, bool)
        there = valid(audio)
        if not is_words(audio.type):
            return pa.repeat("", self.count), ~there
        words = audio.cast(pa.string()).fill_null("")
        named = np.asarray(pc.not_equal(words, "").to_numpy(zero_copy_only=False), bool)
        trusted = self.check.rules.needed_audio_only & spoken | self.check._any_audio
        return words, ~there | (named & trusted)

    def sounds(self, label: NDArray[np.int8]) -> dict[str, Any]:
        """The utterance, or the pair."""
        self.slow |= self.there("speech") & self.there("completion")
        speech = either(self.tokens("speech"), self.tokens("completion"))
        audio, right = self._audio_right(self.get("audio"), speech.right)
        single = speech.there | self.there("audio")
        made: dict[str, Any] = {"speech": speech.lists, "audio": audio}
        self.slow |= ~right | (speech.there & ~speech.right)
        pair = self.there("pair") | self.there("chosen") | self.there("rejected")
        made |= {"pair": pair, "rejected": no_lists(self.count), "rejected_audio": pa.repeat("", self.count)}
        self.slow |= ~single & ~pair
        if pair.any():
            self.slow |= (pair & single) | (pair & (label != NONE))
            made |= self._pairs(pair, made)
        return made

    def _pairs(self, pair: Mask, single: Mapping[str, Any]) -> dict[str, Any]:
        given, parts = self.there("pair"), self.there("chosen") | self.there("rejected")
        self.slow |= given & parts
        inner = fields_of(self.get("pair"))
        sides = []
        for name in ("chosen", "rejected"):
            tokens, audio = None, None
            for column, rows in ((inner.get(name), given), (self.get(name), parts)):
                if column is None:
                    self.slow |= rows
                    continue
                fields = fields_of(column) if pa.types.is_struct(column.type) else {"speech": column}
                some = tokens_of(fields.get("speech"), self.count, self.check.rules.codebook_size)
                paths, right = self._audio_right(fields.get("audio"), some.right)
                self.slow |= rows & ~(some.right & right)
                tokens = some if tokens is None else either(tokens, some)
                audio = paths if audio is None else pc.if_else(pa.array(given), audio, paths)
            sides.append((tokens or tokens_of(None, self.count, 0), audio))
        (chosen, chosen_audio), (rejected, rejected_audio) = sides
        self.slow |= pair & same_lists(chosen.lists, rejected.lists)
        which = pa.array(pair)
        return {
            "speech": chosen_of(pair, chosen.lists, single["speech"]),
            "audio": pc.if_else(which, chosen_audio if chosen_audio is not None else "", single["audio"]),
            "rejected": rejected.lists,
            "rejected_audio": rejected_audio if rejected_audio is not None else pa.repeat("", self.count),
        }

    def prompt(self) -> dict[str, Any]:
        """A recording to continue; only one that is given as speech tokens is judged here."""
        text, speech = self.words("prompt_text"), self.tokens("prompt_speech")
        audio = self.words("prompt_audio")
        recorded = np.asarray(pc.not_equal(audio, "").to_numpy(zero_copy_only=False), bool)
        full = speech.there & (np.diff(np.asarray(speech.lists.offsets)) > 0)
        self.slow |= recorded
        if not is_list(self.get("prompt_speech")):
            self.slow |= speech.there
        self.slow |= full & ~(speech.right & said(text))
        self.slow |= ~full & np.asarray(pc.not_equal(text, "").to_numpy(zero_copy_only=False), bool)
        return {"prompt_text": text, "prompt_speech": speech.lists, "prompt_audio": pa.repeat("", self.count)}

    def vectors(self) -> pa.Array:
        found, kind = self.get("speaker_vector"), pa.list_(pa.float64())
        if found is None:
            return no_lists(self.count, pa.float64())
        values = inner_of(found)
        if values is None or not (pa.types.is_integer(values.type) or values.type in (pa.float32(), pa.float64())):
            self.slow |= self.there("speaker_vector")
            return no_lists(self.count, pa.float64())
        numbers = values.cast(pa.float64(), safe=False)
        odd = ~np.isfinite(numbers.fill_null(np.nan).to_numpy(zero_copy_only=False))
        lists = plain(found)
        self.slow |= any_in(odd, np.asarray(lists.offsets))
        return pa.ListArray.from_arrays(lists.offsets, numbers).cast(kind)

    def rest(self, text: pa.Array) -> list[str]:
        """What few rows have, row by row."""
        made = [""] * self.count
        given = {name: self.get(name) for name in ("spans", *_READERS)}
        given = {name: listed(column) for name, column in given.items() if column is not None}
        if not given:
            return made
        words = text.to_pylist() if "spans" in given else [""] * self.count
        for row in np.flatnonzero(~self.slow).tolist():
            faults: list[str] = []
            parts = {name: values[row] for name, values in given.items() if values[row] is not None}
            spans = read_spans(parts.pop("spans", ()), words[row], faults)
            read = {name: reader(parts.get(name, {}), faults) for name, reader in _READERS.items()}
            if faults:
                self.slow[row] = True
                continue
            marks = [(span.start, span.end, span.right, span.wrong) for span in spans]
            try:
                words_of_row = rest_of(marks, **read)
                words_of_row.encode()
                made[row] = words_of_row
            except (UnicodeEncodeError, TypeError):
                self.slow[row] = True
        return made

    def unknown(self) -> set[str]:
        """Columns that nobody knows; rows in which one may be a slip of the pen are slow."""
        names = {name for name in self.columns.keys() - KNOWN - SPOKEN if self.there(name).any()}
        for name in names:
            if difflib.get_close_matches(name, KNOWN, 1, cutoff=0.8):
                self.slow |= self.there(name)
        return names
