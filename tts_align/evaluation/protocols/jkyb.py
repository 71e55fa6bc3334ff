# SPDX-License-Identifier: Apache-2.0
"""Joyo Kanji Yomi Benchmark, Parakeet edition: whether one kanji was read right, found by its context.

The benchmark of arXiv 2606.25369, as corrected and extended by Parakeet. Rules as its METRICS.md states them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance.Levenshtein import distance as edits

from tts_align.evaluation.protocols.base import Protocol, Reference, TextScore
from tts_align.evaluation.protocols.counts import count_errors
from tts_align.evaluation.protocols.kana import canonical_kana, lengthened, plain_kana

_TAGGED = re.compile(r"([^<>]*)<([^<>]*)>([^<>]*)")


@dataclass(frozen=True)
class Tagged:
    """A reading with one word marked: ``テンキワ<ハ>レ``.

    Args:
        before: what precedes the word.
        target: the word.
        after: what follows it.
    """

    before: str
    target: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Tagged:
        """Split at the tags.

        Raises:
            ValueError: there is not exactly one pair of them.

        >>> Tagged.parse("テンキワ<ハ>レ")
        Tagged(before='テンキワ', target='ハ', after='レ')
        """
        parts = _TAGGED.fullmatch(text)
        if parts is None:
            raise ValueError(f"expected one word between < and >, got {text!r}")
        return cls(*parts.groups())

    def lengthened(self) -> Tagged:
        """The same with its long vowels written out, which pass through the tags."""
        plain = self.before + self.target + self.after
        whole = lengthened(plain)
        if whole == plain:
            return self
        start = len(self.before)
        end = start + len(self.target)
        return Tagged(whole[:start], whole[start:end], whole[end:])


@dataclass(frozen=True)
class Found:
    """Where a candidate reading of the marked word was looked for, and what is there.

    Args:
        said: kana at its place.
        context_errors: edits around it.
        errors: edits between the candidate and what is there, over the candidate's length.
    """

    said: str
    context_errors: int
    errors: float


@dataclass(frozen=True)
class Places:
    """The parts of a transcript that may stand where the marked word should: those with the fewest edits around them.

    Args:
        spans: start and end of each.
        context_errors: edits around them.
    """

    spans: Sequence[tuple[int, int]]
    context_errors: int


def find_target(tagged: Tagged, candidate: str, heard: str) -> Found:
    """The part of a transcript that stands where the marked word should, for one candidate reading.

    Context decides: of all parts, those with the fewest edits around them; among these the nearest to the candidate;
    among these the least moved. A word at the edge of the sentence is looked for at the edge only.

    Args:
        tagged: the reading in canonical kana.
        candidate: reading of the word in canonical kana.
        heard: the transcript in canonical kana.
    """
    whole = tagged.before + candidate + tagged.after
    places = find_places(tagged, heard, edits(whole, heard))
    return nearest_place(tagged, candidate, heard, places)


def find_places(tagged: Tagged, heard: str, most: int) -> Places:
    """Where the context says that the marked word stands.

    Args:
        tagged: the reading in canonical kana.
        heard: the transcript in canonical kana.
        most: edits between the transcript and the sentence with any reading of the word, which are never fewer than
            those around the best place.
    """
    before, after = tagged.before, tagged.after
    first, last = len(before), len(heard) - len(after)
    left_fits, right_fits = heard.startswith(before), heard.endswith(after)
    if left_fits and right_fits and first <= last:
        return Places([(first, last)], 0)
    # A side that does not fit costs an edit at least, which the other cannot have.
    most_left = most - (not right_fits)
    starts = range(max(0, first - most_left), min(len(heard), first + most_left) + 1) if before else range(1)
    left = [(errors, start) for start in starts if (errors := edits(before, heard[:start])) <= most_left]
    most_right = most - min(left)[0]
    ends = range(max(0, last - most_right), min(len(heard), last + most_right) + 1) if after else (len(heard),)
    right = [(errors, end) for end in ends if (errors := edits(after, heard[end:])) <= most_right]
    sums = [(errors + others, start, end) for errors, start in left for others, end in right if start <= end]
    fewest = min(sums)[0]
    return Places([(start, end) for errors, start, end in sums if errors == fewest], fewest)


def nearest_place(tagged: Tagged, candidate: str, heard: str, places: Places) -> Found:
    """Of the places that the context leaves the one nearest to a candidate; see :func:`find_target`."""

    def order(span: tuple[int, int]) -> tuple[int, int, int, int]:
        start, end = span
        moved = abs(start - len(tagged.before)) + abs(len(heard) - end - len(tagged.after))
        return edits(candidate, heard[start:end]), moved, start, end

    start, end = min(places.spans, key=order) if len(places.spans) > 1 else places.spans[0]
    said = heard[start:end]
    wrong = 0.0 if said == candidate else edits(candidate, said) / max(len(candidate), 1)
    return Found(said, places.context_errors, wrong)


class JKYB(Protocol):
    """Character error rate over the kana of the sentence, and what was said for the kanji that is tested.

    Beside the rate stand, as means over all sentences: ``target_accuracy`` (the kanji was read in a natural way),
    ``relaxed_target_accuracy`` (or in an acceptable one), ``target_kana_cer``, ``relaxed_target_kana_cer``; and
    ``text_cer`` where a second recogniser has written the utterance in kanji. The recogniser must write kana.
    """

    name = "jkyb"
    reads = "spoken"

    def normalise(self, text: str, language: str = "") -> str:
        """Canonical kana."""
        return canonical_kana(text)

    def units(self, normalised: str) -> Sequence[str]:
        """Characters."""
        return normalised

    def details(self, reference: Reference, score: TextScore, written: str | None = None) -> dict[str, float]:
        """Numbers of the marked kanji."""
        if not (reference.tagged and reference.natural):
            raise ValueError(
                "protocol jkyb needs the tagged reading and the natural readings of each sentence, which the files of "
                f"the benchmark have (--suite jkyb); there are none for {reference.text!r}"
            )
        natural, relaxed = self._target_errors(reference, score)
        more = {} if written is None else {"text_cer": text_cer(reference.text, written)}
        return {
            "target_accuracy": float(natural == 0),
            "relaxed_target_accuracy": float(relaxed == 0),
            "target_kana_cer": natural,
            "relaxed_target_kana_cer": relaxed,
            **more,
        }

    @staticmethod
    def _target_errors(reference: Reference, score: TextScore) -> tuple[float, float]:
        """Errors of the nearest natural reading of the marked word, and of the nearest natural or marginal one."""
        raw = Tagged.parse(plain_kana(reference.tagged, tags=True))
        tagged = raw.lengthened()
        heard, whole = score.normalised_transcript, tagged.before + tagged.target + tagged.after
        most = score.counts.errors if whole == score.normalised_target else edits(whole, heard)
        places = find_places(tagged, heard, most)

        def errors(reading: str) -> float:
            plain = plain_kana(reading)
            # As it sounds in the sentence.
            sound = (tagged if plain == raw.target else Tagged(raw.before, plain, raw.after).lengthened()).target
            return nearest_place(tagged, sound, heard, places).errors

        natural = min([errors(one) for one in reference.natural])
        return natural, min([natural, *[errors(one) for one in reference.marginal]])


def text_cer(text: str, transcript: str) -> float:
    """Character error rate between texts as written: NFKC, without punctuation, symbols and spaces."""
    expected, heard = (
        [one for one in unicodedata.normalize("NFKC", some) if unicodedata.category(one)[0] not in "PSZC"]
        for some in (text, transcript)
    )
    return count_errors(expected, heard).rate
