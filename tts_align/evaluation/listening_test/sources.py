# SPDX-License-Identifier: Apache-2.0
"""Recordings of one or more systems: scored folders, runs, files of candidates, and folders of sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.evaluation.listening_test.records import ListeningTestError, Recording
from tts_align.evaluation.prompts import SentencePrompt, read_prompts
from tts_align.utils.audio import AudioError, read_recording
from tts_align.utils.files import read_json_lines
from tts_align.utils.readers import read_yaml

UTTERANCES, RUN, TEST = "utterances.jsonl", "config.yaml", "test"
SOUND = (".wav", ".flac", ".ogg", ".mp3")
_ROW = ("text", "language", "speaker", "instruct", "transcript", "reading")


@dataclass(frozen=True)
class Found:
    """Recordings of all systems.

    Args:
        systems: system -> its recordings by the id of the utterance, in the order of the ids.
        left_out: what has no recording, or not one of every system, with the reason.
    """

    systems: Mapping[str, Mapping[str, Recording]]
    left_out: tuple[str, ...] = field(default=())

    def common(self) -> list[str]:
        """Utterances that every system has."""
        first, *others = self.systems.values()
        return sorted(name for name in first if all(name in other for other in others))


def read_systems(places: Sequence[str], sentences: str | None = None) -> Found:
    """Find the recordings of systems.

    Args:
        places: a run, a scored folder, a JSONL file of candidates with recordings, or a folder of sound files that are
            named after their sentences; each may be given as NAME=PATH.
        sentences: file of sentences with texts and marked words, for places that do not know them.

    Raises:
        ListeningTestError: there is nothing at one of the places, or two systems have one name.
    """
    known = {} if sentences is None else {one.id: one for one in read_prompts(sentences)}
    systems: dict[str, dict[str, Recording]] = {}
    left_out: list[str] = []
    for place in places:
        name, equals, rest = place.partition("=")
        given, path = (name, Path(rest)) if equals and not Path(place).exists() else ("", Path(place))
        there, missing = _read(path, given, known)
        left_out += missing
        if not there:
            kinds = "a run, a scored folder, a file of candidates or a folder of sound files"
            raise ListeningTestError(f"{path}: no recording found: expected {kinds}")
        if twice := there.keys() & systems.keys():
            there = {f"{given or path.stem}/{system}": rows for system, rows in there.items()}
            if there.keys() & systems.keys():
                raise ListeningTestError(f"two systems are called {min(twice)}: give them names, as in NAME={path}")
        systems |= {
            system: {row.id: dataclasses.replace(row, system=system) for row in rows} for system, rows in there.items()
        }
    found = Found({name: dict(sorted(rows.items())) for name, rows in systems.items()})
    common = set(found.common())
    alone = sorted({f"{row}: not of every system" for rows in systems.values() for row in rows if row not in common})
    return dataclasses.replace(found, left_out=(*left_out, *alone))


def _read(path: Path, name: str, known: Mapping[str, SentencePrompt]) -> tuple[dict[str, list[Recording]], list[str]]:
    """Recordings of the systems at one place, and what is not there."""
    if path.is_file() and path.suffix == ".jsonl":
        return _of_rows(path, path.parent, name or path.stem, known)
    if not path.is_dir():
        raise ListeningTestError(f"{path}: there is no such run, folder or file of candidates (.jsonl)")
    scored = path / TEST if (path / TEST / UTTERANCES).is_file() else path
    if (scored / UTTERANCES).is_file():
        return _of_rows(scored / UTTERANCES, scored, name, {**_of_recipe(scored.parent), **known})
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SOUND)
    rows = ({"id": file.stem, "sentence": file.stem, "audio": file.name} for file in files)
    found, missing = _recordings(rows, path, name or path.resolve().name, known)
    return found, missing


def _of_recipe(run: Path) -> dict[str, SentencePrompt]:
    """Sentences that the recipe of a run names; none where there is no recipe, or its file is not there any more."""
    if not (run / RUN).is_file():
        return {}
    try:
        recipe = read_yaml(run / RUN)
        for key in ("model", "test"):
            recipe = recipe.get(key) or {} if isinstance(recipe, dict) else {}
        prompts = recipe.get("prompts") if isinstance(recipe, dict) else None
        return {one.id: one for one in read_prompts(prompts)} if prompts else {}
    except (FileNotFoundError, ValueError):
        return {}


def _of_rows(
    path: Path, start: Path, name: str, known: Mapping[str, SentencePrompt]
) -> tuple[dict[str, list[Recording]], list[str]]:
    rows = [row for _, row in read_json_lines(path)]
    several = len({row["system"] for row in rows if "system" in row}) > 1
    for row in rows:
        own = row.get("system", "")
        row["system"] = f"{name}/{own}" if name and several else name or own or start.resolve().name
    return _recordings(rows, start, "", known)


def _recordings(
    rows: Iterable[Mapping[str, Any]], start: Path, system: str, known: Mapping[str, SentencePrompt]
) -> tuple[dict[str, list[Recording]], list[str]]:
    found: dict[str, list[Recording]] = {}
    left_out = []
    for row in rows:
        name, audio = str(row.get("id", "")), str(row.get("audio") or "")
        if not name or not audio:
            left_out.append(f"{name or 'a row without an id'}: no recording")
        elif fault := _fault(start / audio):
            left_out.append(f"{name}: {fault}")
        else:
            recording = _recording(row, start / audio, row.get("system", system), known)
            found.setdefault(recording.system, []).append(recording)
    return found, left_out


def _fault(path: Path) -> str:
    """What is wrong with a recording, which is read as a whole; empty if nothing is."""
    if not path.is_file():
        return f"there is no recording {path}"
    try:
        read_recording(path)
    except AudioError as error:
        return f"cannot use the recording {error}"
    return ""


def _recording(row: Mapping[str, Any], audio: Path, system: str, known: Mapping[str, SentencePrompt]) -> Recording:
    sentence = str(row.get("sentence") or row["id"])
    prompt = known.get(sentence) or known.get(str(row["id"])) or _own_prompt(row)
    texts: dict[str, Any] = {name: str(row[name]) for name in _ROW if isinstance(row.get(name), str)}
    if prompt is None:
        texts.pop("transcript", None)
        return Recording(system, str(row["id"]), sentence, audio, speech=tuple(row.get("speech") or ()), **texts)
    texts |= {"text": prompt.text, "language": prompt.language, "instruct": prompt.instruct}
    texts |= {"transcript": prompt.target_text}
    speech = tuple(row.get("speech") or ())
    return Recording(system, str(row["id"]), sentence, audio, speech=speech, spans=prompt.spans, **texts)


def _own_prompt(row: Mapping[str, Any]) -> SentencePrompt | None:
    """The sentence as a row of candidates has it; ``None`` for a row that does not know its marked words."""
    if "spans" not in row and "transcripts" not in row:
        return None
    try:
        return SentencePrompt.from_row({**row, "id": row.get("sentence") or row["id"], "speaker": ""})
    except (ValueError, TypeError) as error:
        raise ListeningTestError(f"{row['id']}: {error}") from None
