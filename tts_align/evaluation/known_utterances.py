# SPDX-License-Identifier: Apache-2.0
"""Utterances whose reading is known: recordings of it, and sentences in which it is written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tts_align.evaluation.faults import raise_if_memory_is_exhausted
from tts_align.evaluation.judges.base import Expected, Judge, SpeechSample, Verdict
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.readings.lexicon import Lexicon
from tts_align.evaluation.readings.spelling import Marked, Script, spell
from tts_align.utils.audio import load_audio
from tts_align.utils.files import read_json_lines

RECORDINGS = "recordings.jsonl"
"""The list of recordings in a folder of them."""
_RATE = 16000


@dataclass(frozen=True)
class KnownUtterance:
    """An utterance whose reading is known.

    Args:
        sample: the sound.
        expected: the sentence; what is right there is what was said.
        word: the marked word as written, for the table.
    """

    sample: SpeechSample
    expected: Expected
    word: str

    @property
    def name(self) -> str:
        """Word and reading."""
        return f"{self.word}/{self.expected.right[0]}"


def is_recorded(path: Path) -> bool:
    """Whether a file or folder lists recordings, and not just sentences."""
    if path.is_dir():
        return True
    return path.suffix == ".jsonl" and any("audio" in row for _, row in read_json_lines(path))


def read_recordings(path: Path) -> list[tuple[SentencePrompt, Path]]:
    """Recordings with marked words; ``right`` of the first span is what is said in the recording.

    Args:
        path: JSONL file with columns ``id``, ``text``, ``spans`` and ``audio`` (relative to the file), or a folder that
            holds such a file by the name ``recordings.jsonl``.

    Raises:
        ValueError: with file and line.
    """
    file = path / RECORDINGS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is not there: expected a list of recordings with columns id, text, spans and audio")
    found = []
    for number, row in read_json_lines(file):
        try:
            prompt = SentencePrompt.from_row(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        if not isinstance(row.get("audio"), str):
            raise ValueError(f"{file}:{number}: audio: expected the path of a recording, got {row.get('audio')!r}")
        if not prompt.right:
            raise ValueError(f"{file}:{number}: no marked word: expected spans with right, the reading that is said")
        found.append((prompt, file.parent / row["audio"]))
    if not found:
        raise ValueError(f"{file}: holds no recording")
    return found


def load_known(prompt: SentencePrompt, audio: Path, language: str = "") -> KnownUtterance:
    """A recording with what is said in it.

    Raises:
        AudioError: the recording is missing or unusable.
    """
    sound = load_audio(audio, _RATE)
    expected = dataclasses.replace(prompt.expected, language=prompt.language or language)
    return KnownUtterance(SpeechSample(torch.zeros(0, dtype=torch.long), sound, _RATE), expected, word_of(prompt))


def word_of(prompt: SentencePrompt) -> str:
    """The first marked word as written; without one the readings it is named by."""
    if not prompt.spans:
        return "/".join(prompt.transcripts)
    return prompt.text[prompt.spans[0].start : prompt.spans[0].end]


def written_out(prompt: SentencePrompt, language: str, lexicon: Lexicon) -> list[tuple[SentencePrompt, SentencePrompt]]:
    """A sentence with each reading of its marked word written out, so that a policy can hardly misread it.

    Japanese readings stand in katakana, Mandarin ones as a character of that sound alone, English ones as a word of
    that sound; a lexicon's spellings come before these.

    Args:
        prompt: the sentence.
        language: of a sentence that does not say its own.
        lexicon: of the user.

    Returns:
        For each reading that can be written out, what is spoken, and the original with that reading as the right one.
    """
    code = prompt.language or language
    marked = Marked(prompt.text, prompt.spans, {}, prompt.right, code.partition("-")[0])
    if not prompt.spans:
        return []
    first, pairs = prompt.spans[0], []
    readings = dict.fromkeys([*first.right, *first.wrong])
    for reading, texts in spell(marked, Script.WRITTEN, lexicon).items():
        own = lexicon.spellings(marked.word, reading)
        if not texts or reading not in readings:
            continue
        text = texts[0] if own or marked.language != "ja" else texts[-1]
        # Readings that are equally right are not told apart.
        same = [one for one in (first.right if reading in first.right else ()) if one != reading]
        right = (reading, *same)
        span = dataclasses.replace(first, right=right, wrong=tuple(one for one in readings if one not in right))
        original = dataclasses.replace(
            prompt, id=f"{prompt.id}-{reading}", spans=(span, *prompt.spans[1:]), right=right, language=code
        )
        spoken = dataclasses.replace(original, text=text, spans=(), transcripts={"": text}, right=())
        pairs.append((spoken, original))
    return pairs


def hear(judge: Judge, known: Sequence[KnownUtterance]) -> list[Verdict | str]:
    """Verdicts, or why there is none: a batch that fails is judged one by one.

    Raises:
        Exception: memory is exhausted.
    """
    if not known:
        return []
    try:
        return list(judge.judge([one.sample for one in known], [one.expected for one in known]))
    except Exception as error:
        raise_if_memory_is_exhausted(error)
        if len(known) == 1:
            return [f"{type(error).__name__}: {error}"]
    return [verdict for one in known for verdict in hear(judge, [one])]
