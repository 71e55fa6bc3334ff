# SPDX-License-Identifier: Apache-2.0
"""The file in which voices are listed: a recording on each line, with what is said in it or how to speak."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tts_align.models.cosyvoice.text import END_OF_PROMPT
from tts_align.utils.files import read_json_lines

Mode = Literal["zero_shot", "cross_lingual", "instruct", "sft"]
STORED = "spk2info.pt"
"""Where a model directory keeps voices of its own."""
_ASSISTANT = f"You are a helpful assistant.{END_OF_PROMPT}"
_COLUMNS = ("speaker", "audio", "text", "instruct", "mode")
_FILE_MODES: tuple[Mode, ...] = ("zero_shot", "cross_lingual", "instruct")


@dataclass(frozen=True)
class VoiceRow:
    """One line of a file of voices, checked.

    Args:
        where: file and line.
        speaker: name of the voice.
        audio: path of the recording.
        text: its transcript, in zero_shot only.
        instruct: how to speak, in instruct only.
        mode: what the language model gets.
    """

    where: str
    speaker: str
    audio: Path
    text: str
    instruct: str
    mode: Mode


def read_voice_rows(path: Path) -> list[VoiceRow]:
    """The lines of a file of voices; see :class:`tts_align.models.cosyvoice.voices.Voices`.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as expected; the message names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of voices {path}")
    rows: dict[str, VoiceRow] = {}
    for number, columns in read_json_lines(path):
        row = _read_row(f"{path}:{number}", columns, path.parent)
        if row.speaker in rows:
            raise ValueError(f"{row.where}: speaker {row.speaker!r} is taken by {rows[row.speaker].where}")
        rows[row.speaker] = row
    if not rows:
        raise ValueError(f"{path} holds no voices: expected a line of JSON for each")
    return list(rows.values())


def _read_row(where: str, columns: Mapping[str, Any], folder: Path) -> VoiceRow:
    given = {name: value for name, value in columns.items() if value is not None}
    for name, value in given.items():
        if name not in _COLUMNS:
            near = difflib.get_close_matches(name, _COLUMNS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_COLUMNS)}"
            raise ValueError(f"{where}: unknown column {name!r}: {hint}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name}: expected words, got {json.dumps(value):.60}")
    if lacking := [name for name in ("speaker", "audio") if not given.get(name)]:
        raise ValueError(f"{where}: {' and '.join(lacking)} must be given")
    text, instruct = bare_transcript(given.get("text", "")), given.get("instruct", "")
    mode = given.get("mode") or ("instruct" if instruct else "zero_shot" if text else "cross_lingual")
    if mode not in _FILE_MODES:
        hint = f"voices of sft come from {STORED}" if mode in get_args(Mode) else f"expected {', '.join(_FILE_MODES)}"
        raise ValueError(f"{where}: mode {mode!r}: {hint}")
    if bool(instruct) != (mode == "instruct"):
        raise ValueError(f"{where}: mode {mode} {'takes no' if instruct else 'needs an'} instruct")
    if mode == "zero_shot" and not text.strip():
        raise ValueError(f"{where}: mode zero_shot needs text, the transcript of the recording")
    if END_OF_PROMPT in text:
        raise ValueError(f"{where}: text is the transcript only; what stands before {END_OF_PROMPT} is the instruct")
    audio = folder / given["audio"]
    if not audio.is_file():
        raise ValueError(f"{where}: there is no recording {audio}")
    return VoiceRow(where, given["speaker"], audio, text if mode == "zero_shot" else "", instruct, mode)


def bare_transcript(text: str) -> str:
    """A transcript without version 3's assistant line, which the policy puts there itself."""
    return text.removeprefix(_ASSISTANT)
