# SPDX-License-Identifier: Apache-2.0
"""Lists of Seed-TTS-Eval: ``meta.lst`` and ``hardcase.lst``, fields between bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.protocols import Reference
from tts_align.evaluation.suites.base import Faults, Suite, SuiteItem, VoiceNames, language_of, listed, text_lines

_FIELDS = "utt|text, utt|text|prompt_wav, utt|prompt_text|prompt_wav|text or utt|prompt_text|prompt_wav|text|true_wav"


@dataclass(frozen=True)
class _Line:
    """The fields of one line; those it has not are empty."""

    name: str
    text: str
    prompt_text: str = ""
    prompt_audio: str = ""
    truth_audio: str = ""

    @classmethod
    def parse(cls, line: str) -> _Line:
        """Two, three, four or five fields, as the official reader takes them."""
        match line.split("|"):
            case [name, text]:
                return cls(name, text)
            case [name, text, prompt]:
                return cls(name.removesuffix(".wav"), text, "", prompt)
            case [name, prompt_text, prompt, text]:
                return cls(name, text, prompt_text, prompt)
            case [name, prompt_text, prompt, text, truth]:
                return cls(name, text, prompt_text, prompt, truth)
            case fields:
                raise ValueError(f"expected {_FIELDS}, got {len(fields)} fields")


def read_seed(path: Path, language: str = "") -> Suite:
    """Read a list of Seed-TTS-Eval.

    Args:
        path: the list, or the folder in which ``meta.lst`` lies.
        language: of the sentences; by default that of the folder's name (en, zh), else Chinese where a sentence has
            Chinese characters and English where not.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    place = path / "meta.lst" if path.is_dir() else path
    if path.is_dir() and not place.is_file():
        raise ValueError(f"{path} has no meta.lst: name a list; there are {listed(path.rglob('*.lst'))}")
    faults, voices = Faults(path=place), VoiceNames()
    folder = place.parent.name if place.parent.name in ("en", "zh") else ""
    items = []
    for number, line in text_lines(place):
        try:
            fields = _Line.parse(line)
        except ValueError as error:
            faults.add(number, str(error))
            continue
        if not faults.check_id(number, fields.name):
            continue
        if not fields.text.strip():
            faults.add(number, "the text is empty")
            continue
        spoken_in = language or folder or language_of(fields.text)
        audio = place.parent / fields.prompt_audio if fields.prompt_audio else None
        items.append(
            SuiteItem(
                SentencePrompt(fields.name, fields.text, spoken_in, voices.name(audio, fields.prompt_text)),
                Reference(fields.text, spoken_in),
                audio,
                fields.prompt_text,
                place.parent / fields.truth_audio if fields.truth_audio else None,
                f"{place}:{number}",
            )
        )
    faults.finish(items)
    return Suite("seed", str(path), tuple(items), "seed")
