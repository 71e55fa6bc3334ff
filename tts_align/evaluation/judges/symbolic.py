# SPDX-License-Identifier: Apache-2.0
"""The judge of the symbolic corpus: speech tokens that spell kana, read back exactly.

A kana is a *begin* code and one to three times its *inside* code; each voice has its own tokens. So the reading of an
utterance is known without a recogniser, and an experiment takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kaldialign import align

from tts_align.evaluation.judges.base import Expected, Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.metrics.functional import character_errors, nearest_cer

KANA = "あいおかきぎくけげこごさざしすずそただちっつてでとどなねのびふぷべぼまみむめもゆょよらりるれわんー"
"""The kana that the corpus may use; a kana's position is its number."""
VOICES = ("sakura", "takumi")
CODES_PER_KANA = 2 * len(VOICES)
LONGEST_REPEAT = 3
_LONGEST_SEGMENT = 8
_PER_KANA = 1e-3  # fewer kana win between equally good spellings
_GAP = "·"


@dataclass(frozen=True)
class Segment:
    """One kana as it was spoken.

    Args:
        kana: which.
        start: its first token.
        end: after its last token.
    """

    kana: str
    start: int
    end: int


def begin_code(kana: str, speaker: str) -> int:
    """Token that a kana begins with in a voice; the next number is its inside token."""
    return CODES_PER_KANA * KANA.index(kana) + 2 * VOICES.index(speaker)


def decode(speech: Sequence[int]) -> list[Segment]:
    """The kana that speech tokens spell with the fewest speech tokens out of place.

    A token counts for its kana in either voice. A segment costs one for each token that is not its kana's, and one more
    if it is shorter or longer than speech ever is; so a single disturbed token never changes what is read.

    Args:
        speech: speech tokens without end-of-speech.
    """
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # cost up to here, start of the last segment, its kana
    best += [(float("inf"), 0, 0)] * len(speech)
    for start in range(len(speech)):
        matches: dict[int, int] = {}
        kana, most = speech[start] // CODES_PER_KANA, 0
        for end in range(start + 1, min(start + _LONGEST_SEGMENT, len(speech)) + 1):
            code = speech[end - 1]
            if (code % 2 == 1) == (end - 1 > start):
                owner = code // CODES_PER_KANA
                matches[owner] = matches.get(owner, 0) + 1
                if matches[owner] > most:
                    kana, most = owner, matches[owner]
            length = end - start
            strange = length == 1 or length > 1 + LONGEST_REPEAT
            cost = best[start][0] + length - most + strange + _PER_KANA
            if cost < best[end][0]:
                best[end] = (cost, start, kana)
    return _segments(best)


def _segments(best: list[tuple[float, int, int]]) -> list[Segment]:
    end, segments = len(best) - 1, []
    while end:
        _, start, kana = best[end]
        segments.append(Segment(KANA[kana], start, end))
        end = start
    return segments[::-1]


class SymbolicJudge(Judge):
    """Reads the speech tokens of the symbolic corpus back to kana and compares them with what should have been said."""

    needs_audio = False

    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        """One verdict per utterance."""
        return [self._judge(one.speech.tolist(), target) for one, target in zip(samples, expected, strict=True)]

    def _judge(self, speech: list[int], expected: Expected) -> Verdict:
        segments = decode(speech)
        transcript = "".join(segment.kana for segment in segments)
        readings = expected.transcripts
        nearest = nearest_cer(tuple(readings.values()), transcript)
        right = [readings[reading] for reading in expected.right if reading in readings]
        if not (marked := [reading for reading in readings if reading]):
            return Verdict(transcript, Reading.UNMARKED, nearest, nearest)
        edits = {reading: character_errors(readings[reading], transcript)[0] for reading in marked}
        choice = min(edits, key=edits.__getitem__)
        others = [count for reading, count in edits.items() if reading != choice]
        place = _place(choice, readings[choice], transcript)
        spelt = place is not None and transcript[place[0] : place[1]] == choice
        said = Reading.NEITHER
        if spelt and edits[choice] < min(others, default=len(transcript) + 1):
            said = Reading.RIGHT if choice in expected.right else Reading.WRONG
        share = None if place is None else (segments[place[0]].start, segments[place[1] - 1].end)
        return Verdict(
            transcript,
            said,
            cer=nearest_cer(right, transcript),
            nearest_cer=nearest,
            target_share=None if share is None else (share[0] / len(speech), share[1] / len(speech)),
        )


def _place(reading: str, sentence: str, transcript: str) -> tuple[int, int] | None:
    """Characters [start, end) of the transcript that stand where the sentence has the reading; ``None`` if none do."""
    first = sentence.index(reading)
    position, heard, inside = 0, 0, []
    for expected, said in align(list(sentence), list(transcript), _GAP):
        # Something inserted before the reading belongs to the word before.
        if said != _GAP and first + (expected == _GAP) <= position < first + len(reading):
            inside.append(heard)
        position += expected != _GAP
        heard += said != _GAP
    return (inside[0], inside[-1] + 1) if inside else None
