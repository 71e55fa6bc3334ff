# SPDX-License-Identifier: Apache-2.0
"""Candidates for a recogniser: a sentence with its marked word spelled as each of its readings, all else the same.

Dictionaries only propose how a reading may be spelled; which one was said is decided by the sound. The written form of
the marked word belongs to all of its readings and is never a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tts_align.data.records import Span
from tts_align.evaluation.readings import english, japanese, mandarin
from tts_align.evaluation.readings.choice import distinct
from tts_align.evaluation.readings.lexicon import Lexicon


class Script(StrEnum):
    """What a recogniser writes."""

    WRITTEN = "written"
    """The language as people write it."""
    KANA = "kana"
    """Japanese in kana alone."""
    PINYIN = "pinyin"
    """Mandarin in pinyin syllables with the number of their tone, with spaces between them."""
    PHONEMES = "phonemes"
    """English in ARPAbet phonemes with stress, with spaces between them."""


@dataclass(frozen=True)
class Marked:
    """A sentence, and how the first of its marked words may be read.

    Args:
        text: as written.
        spans: marked words; empty if none is.
        transcripts: reading -> transcript of the whole sentence; may be empty.
        right: readings that are right.
        language: code of the language, without region.
    """

    text: str
    spans: Sequence[Span] = ()
    transcripts: Mapping[str, str] = field(default_factory=dict)
    right: Sequence[str] = ()
    language: str = ""

    @property
    def word(self) -> str:
        """The first marked word as written; empty without one."""
        return self.text[self.spans[0].start : self.spans[0].end] if self.spans else ""


def candidate_readings(marked: Marked, lexicon: Lexicon) -> tuple[str, ...]:
    """Readings to choose between: those that the sentence names; without wrong ones among them also a dictionary's.

    Args:
        marked: the sentence.
        lexicon: of the user; of a marked word that it has, it says all readings.
    """
    named = dict.fromkeys([*marked.right, *(name for name in marked.transcripts if name)])
    if marked.spans:
        named |= dict.fromkeys([*marked.spans[0].right, *marked.spans[0].wrong])
    if not marked.spans or set(named) - set(marked.right):
        return tuple(named)
    found = lexicon.readings(marked.word) or _readings(marked)
    same = {_plain(name, marked.language) for name in named}
    return (*named, *(one for one in found if _plain(one, marked.language) not in same))


def _readings(marked: Marked) -> tuple[str, ...]:
    """Readings of the marked word that a dictionary of the language knows."""
    if marked.language == "ja":
        return japanese.readings(marked.word)
    if marked.language == "zh":
        return mandarin.readings(marked.word)
    return english.readings(marked.word) if marked.language == "en" else ()


def _plain(reading: str, language: str) -> str:
    """A reading in the one form in which two of them are compared."""
    if language == "ja":
        return japanese.hiragana(reading)
    if language == "zh":
        return mandarin.numbered(reading)
    return " ".join(reading.split())


def spell(marked: Marked, script: Script, lexicon: Lexicon) -> dict[str, tuple[str, ...]]:
    """Reading -> the sentence in each spelling of it that is no other reading's.

    Args:
        marked: the sentence.
        script: what the recogniser writes.
        lexicon: of the user.

    Raises:
        ValueError: the rest of the sentence cannot be brought into the script; the message says what it needs.
    """
    readings = candidate_readings(marked, lexicon)
    spelled = {
        Script.WRITTEN: _written,
        Script.KANA: _kana,
        Script.PINYIN: _pinyin,
        Script.PHONEMES: _phonemes,
    }[script]
    return distinct({reading: spelled(marked, reading, lexicon) for reading in readings})


def _around(marked: Marked) -> tuple[str, str]:
    """What stands before and after the marked word; something always does after it, so that its end is scored too."""
    span = marked.spans[0]
    after = marked.text[span.end :]
    return marked.text[: span.start], after or ("。" if marked.language in ("ja", "zh") else ".")


def _written(marked: Marked, reading: str, lexicon: Lexicon) -> tuple[str, ...]:
    if not marked.spans:
        transcript = marked.transcripts.get(reading, "")
        kana = japanese.is_kana(transcript) and marked.language == "ja"
        return tuple(dict.fromkeys(japanese.variants(transcript) if kana else [transcript] if transcript else []))
    before, after = _around(marked)
    own = lexicon.spellings(marked.word, reading)
    if marked.language == "ja":
        own = (*own, *japanese.variants(reading))
    elif marked.language == "zh":
        own = (*own, *mandarin.homophones(marked.word, reading))
    elif marked.language == "en":
        own = (*own, *english.homophones(marked.word, reading, lexicon))
    return tuple(f"{before}{one}{after}" for one in dict.fromkeys(own) if one != marked.word)


def _kana(marked: Marked, reading: str, lexicon: Lexicon) -> tuple[str, ...]:
    if reading in marked.transcripts:
        return japanese.variants(japanese.only_kana(marked.transcripts[reading]))
    before, after = marked.text[: marked.spans[0].start], marked.text[marked.spans[0].end :]
    kana = (japanese.sentence(before, lexicon), japanese.hiragana(reading), japanese.sentence(after, lexicon))
    return japanese.variants("".join(kana))


def _pinyin(marked: Marked, reading: str, lexicon: Lexicon) -> tuple[str, ...]:
    if reading in marked.transcripts:
        return (mandarin.numbered(marked.transcripts[reading]),)
    span = marked.spans[0]
    before, after = mandarin.around(marked.text, span.start, span.end, lexicon)
    return (" ".join(filter(None, (before, mandarin.numbered(reading), after))),)


def _phonemes(marked: Marked, reading: str, lexicon: Lexicon) -> tuple[str, ...]:
    if reading in marked.transcripts:
        return (marked.transcripts[reading],)
    before, after = marked.text[: marked.spans[0].start], marked.text[marked.spans[0].end :]
    phonemes = [*english.sentence(before, lexicon), *reading.split(), *english.sentence(after, lexicon)]
    return (" ".join(phonemes),)


def unmarked(marked: Marked, script: Script, lexicon: Lexicon) -> tuple[str, ...]:
    """A whole sentence in a script, each word read as a dictionary has it first.

    Args:
        marked: the sentence, whose marks do not count.
        script: what the recogniser writes.
        lexicon: of the user.
    """
    if script is Script.KANA:
        return japanese.variants(japanese.sentence(marked.text, lexicon))
    if script is Script.PINYIN:
        return (mandarin.sentence(marked.text, lexicon),)
    if script is Script.PHONEMES:
        return (" ".join(english.sentence(marked.text, lexicon)),)
    return (marked.text,)


def reference_texts(
    marked: Marked, spelled: Mapping[str, Sequence[str]], script: Script, lexicon: Lexicon
) -> dict[str, tuple[str, ...]]:
    """Reading -> every text that is no error when it is said so; of a sentence without a marked word under ``""``.

    Args:
        marked: the sentence.
        spelled: what :func:`spell` gave.
        script: what the recogniser writes.
        lexicon: of the user.
    """
    written = (marked.text,) if script is Script.WRITTEN else ()
    if not spelled:
        given = [text for text in marked.transcripts.values() if text]
        return {"": tuple(dict.fromkeys([*written, *(given or unmarked(marked, script, lexicon))]))}
    return {
        reading: tuple(dict.fromkeys([*written, *filter(None, [marked.transcripts.get(reading)]), *texts]))
        for reading, texts in spelled.items()
    }
