# SPDX-License-Identifier: Apache-2.0
"""Joyo Kanji Yomi Benchmark, Parakeet edition: whether one kanji was read right, found by its context.

The benchmark of arXiv 2606.25369, as corrected and extended by Parakeet. Rules as its METRICS.md states them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tts_align.evaluation.protocols.base import Protocol, Reference
from tts_align.evaluation.protocols.counts import count_errors
from tts_align.evaluation.protocols.kana import canonical_kana


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
        before, opened, rest = text.partition("<")
        target, closed, after = rest.partition(">")
        if not (opened and closed) or any(tag in before + target + after for tag in "<>"):
            raise ValueError(f"expected one word between < and >, got {text!r}")
        return cls(before, target, after)


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


def find_target(tagged: Tagged, candidate: str, heard: str) -> Found:
    """The part of a transcript that stands where the marked word should, for one candidate reading.

    Context decides: of all parts, those with the fewest edits around them; among these the nearest to the candidate;
    among these the least moved. A word at the edge of the sentence is looked for at the edge only.

    Args:
        tagged: the reading in canonical kana.
        candidate: reading of the word in canonical kana.
        heard: the transcript in canonical kana.
    """
    if heard == tagged.before + candidate + tagged.after:
        return Found(candidate, 0, 0.0)
    left = _prefix_errors(tagged.before, heard)
    right = _prefix_errors(tagged.after[::-1], heard[::-1])[::-1]
    starts = range(len(heard) + 1) if tagged.before else range(1)
    ends = range(len(heard) + 1) if tagged.after else range(len(heard), len(heard) + 1)
    pairs = [(start, end) for start in starts for end in ends if start <= end]
    fewest = min(left[start] + right[end] for start, end in pairs)

    def order(pair: tuple[int, int]) -> tuple[int, int, int, int]:
        start, end = pair
        moved = abs(start - len(tagged.before)) + abs(len(heard) - end - len(tagged.after))
        return count_errors(list(candidate), list(heard[start:end])).errors, moved, start, end

    start, end = min((pair for pair in pairs if left[pair[0]] + right[pair[1]] == fewest), key=order)
    said = heard[start:end]
    return Found(said, fewest, count_errors(list(candidate), list(said)).rate)


def _prefix_errors(pattern: str, text: str) -> list[int]:
    """Edit distance between a pattern and each beginning of a text, the empty one first."""
    row = list(range(len(text) + 1))
    for number, one in enumerate(pattern, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(text, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (one != other))
    return row


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
        return list(normalised)

    def details(self, reference: Reference, transcript: str, written: str | None = None) -> dict[str, float]:
        """Numbers of the marked kanji."""
        if not (reference.tagged and reference.natural):
            raise ValueError(
                "protocol jkyb needs the tagged reading and the natural readings of each sentence, which the files of "
                f"the benchmark have (--suite jkyb); there are none for {reference.text!r}"
            )
        heard = canonical_kana(transcript)
        tagged = Tagged.parse(canonical_kana(reference.tagged, tags=True))
        found = {
            candidate: find_target(tagged, candidate, heard).errors for candidate, _ in self._candidates(reference)
        }
        natural = min(found[candidate] for candidate, is_natural in self._candidates(reference) if is_natural)
        relaxed = min(found.values())
        more = {} if written is None else {"text_cer": text_cer(reference.text, written)}
        return {
            "target_accuracy": float(natural == 0),
            "relaxed_target_accuracy": float(relaxed == 0),
            "target_kana_cer": natural,
            "relaxed_target_kana_cer": relaxed,
            **more,
        }

    @staticmethod
    def _candidates(reference: Reference) -> Iterator[tuple[str, bool]]:
        """Readings of the marked word in canonical kana, as they sound in the sentence, and whether each is natural."""
        raw = Tagged.parse(reference.tagged)
        for readings, is_natural in ((reference.natural, True), (reference.marginal, False)):
            for reading in readings:
                whole = canonical_kana(f"{raw.before}<{reading}>{raw.after}", tags=True)
                yield Tagged.parse(whole).target, is_natural


def text_cer(text: str, transcript: str) -> float:
    """Character error rate between texts as written: NFKC, without punctuation, symbols and spaces."""
    expected, heard = (
        [one for one in unicodedata.normalize("NFKC", some) if unicodedata.category(one)[0] not in "PSZC"]
        for some in (text, transcript)
    )
    return count_errors(expected, heard).rate
