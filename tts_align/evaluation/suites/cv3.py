# SPDX-License-Identifier: Apache-2.0
"""Folders of CV3-Eval: ``text``, ``prompt_text`` and ``prompt_wav.scp``, a name and a value on each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.protocols import Reference
from tts_align.evaluation.suites.base import Faults, FirstFaults, Suite, SuiteItem, VoiceNames, listed, text_lines

LANGUAGES = ("zh", "en", "ja", "ko", "de", "es", "fr", "it", "ru")
"""Languages of the benchmark, with which its folders' names end: ``ja``, ``hard_zh``, ``to_en``."""


@dataclass(frozen=True)
class _Table:
    """One of the files.

    Args:
        path: of the file.
        values: name -> the rest of its line.
        lines: name -> number of its line.
    """

    path: Path
    values: Mapping[str, str]
    lines: Mapping[str, int]


def read_cv3(path: Path, language: str = "") -> Suite:
    """Read a set of CV3-Eval.

    Voices of a cross-lingual set are given without the transcript of their recording, as they do not continue it.

    Args:
        path: the folder, such as ``data/zero_shot/ja``.
        language: of the sentences; by default that of the folder's name.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    if not (path / "text").is_file():
        inside = [one.parent for one in path.rglob("text")] if path.is_dir() else []
        raise ValueError(f"{path} is no folder of CV3-Eval, it has no file text; such folders in it: {listed(inside)}")
    faults, voices = Faults(path / "text"), VoiceNames()
    spoken_in = language or _language(path)
    texts = _read(path / "text", faults)
    prompts, recordings = (_read(path / name, faults) for name in ("prompt_text", "prompt_wav.scp"))
    FirstFaults(_incomplete(texts, prompts, recordings)).check()
    across = "cross_lingual" in str(path)
    items = []
    for name, text in texts.values.items():
        audio = _located(recordings.values[name], path) if name in recordings.values else None
        prompt_text = "" if across else prompts.values.get(name, "")
        items.append(
            SuiteItem(
                SentencePrompt(name, text, spoken_in, voices.name(audio, prompt_text)),
                Reference(text, spoken_in),
                audio,
                prompt_text,
                where=f"{texts.path}:{texts.lines[name]}",
            )
        )
    faults.finish(items)
    return Suite("cv3", str(path), tuple(items), "cv3")


def _language(path: Path) -> str:
    """Language of the innermost folder whose name ends with one."""
    for part in reversed(path.absolute().parts):
        end = part.rpartition("_")[2]
        if end in LANGUAGES:
            return end
    raise ValueError(f"the name of {path} does not say which language it is: give the language")


def _read(path: Path, faults: Faults) -> _Table:
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    checked = Faults(path)
    for number, line in text_lines(path) if path.is_file() else ():
        name, *rest = line.split(maxsplit=1)
        if not rest:
            checked.add(number, f"expected a name and a value, got {line!r}")
        elif checked.check_id(number, name):
            values[name], lines[name] = rest[0], number
    faults.found.join(checked.found)
    return _Table(path, values, lines)


def _incomplete(texts: _Table, *others: _Table) -> Iterator[str]:
    """A table that exists names every utterance."""
    for other in others:
        if other.path.is_file():
            for name in texts.values:
                if name not in other.values:
                    yield f"{texts.path}:{texts.lines[name]}: {other.path.name} has no line for {name!r}"


def _located(name: str, folder: Path) -> Path:
    """Where a recording lies: paths begin at the root of the repository, which is some way up from the folder."""
    start = folder.absolute()
    found = [one / name for one in (start, *start.parents) if (one / name).is_file()]
    return found[0] if found else start / name
