# SPDX-License-Identifier: Apache-2.0
"""Kaldi-style folders, as CosyVoice's recipes write them: ``wav.scp``, ``text`` and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tts_align.data.records import Fault, ManifestError, Raw, located
from tts_align.utils.readers import ReadError, load_tensors

_TABLES = ("wav.scp", "text", "utt2spk", "instruct")


def is_folder(path: Path) -> bool:
    """Whether a directory is such a folder."""
    return (path / "wav.scp").is_file() or (path / "utt2speech_token.pt").is_file()


def files_of(path: Path) -> list[Path]:
    """The files of a folder that say something."""
    reject = path.resolve().with_name(f"{path.resolve().name}_reject")
    names = [path / name for name in (*_TABLES, "utt2speech_token.pt", "utt2embedding.pt", "spk2embedding.pt")]
    return [file for file in (*names, reject / "utt2speech_token.pt") if file.is_file()]


@dataclass(frozen=True)
class _Table:
    """One of the text files.

    Args:
        values: utterance -> the rest of its line.
        lines: utterance -> place of its line.
        there: whether the file exists.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)
    there: bool = False


@dataclass(frozen=True)
class _Folder:
    """Everything a folder says."""

    tables: Mapping[str, _Table]
    speech: Mapping[str, Any]
    rejected: Mapping[str, Any]
    utterance_vectors: Mapping[str, Any]
    speaker_vectors: Mapping[str, Any]


def read_folder(path: Path) -> Iterator[Raw]:
    """The rows of a folder, in the columns of our manifests, in the order of ``wav.scp``.

    ``utt2spk`` and ``instruct`` are optional, but where they exist they must name every utterance. Speech tokens
    (``utt2speech_token.pt``), speaker vectors (``utt2embedding.pt``, else ``spk2embedding.pt``) and the rejected tokens
    of the sibling folder ``<path>_reject`` are taken where they are. A path in ``wav.scp`` that is not absolute begins
    at the folder or, as Kaldi has it, where the command runs. Commands (``... |``) are never run.

    Raises:
        ManifestError: a file cannot be read or is not what its name says.
    """
    faults: list[Fault] = []
    tables = {name: _table(path / name, faults) for name in _TABLES}
    reject = path.resolve().with_name(f"{path.resolve().name}_reject")
    whole = _Folder(
        tables,
        speech=_numbers(path / "utt2speech_token.pt", faults),
        rejected=_numbers(reject / "utt2speech_token.pt", faults),
        utterance_vectors=_numbers(path / "utt2embedding.pt", faults),
        speaker_vectors=_numbers(path / "spk2embedding.pt", faults),
    )
    if faults:
        raise ManifestError(path, faults)
    for name in dict.fromkeys((*tables["wav.scp"].values, *whole.speech, *tables["text"].values)):
        yield _row(path, name, whole)


def _row(path: Path, name: str, whole: _Folder) -> Raw:
    where = whole.tables["wav.scp"].lines.get(name) or whole.tables["text"].lines.get(name) or f"{path}: {name}"
    lacking = [
        table
        for table in ("text", "utt2spk", "instruct")
        if name not in whole.tables[table].values and (table == "text" or whole.tables[table].there)
    ]
    recording = whole.tables["wav.scp"].values.get(name, "")
    if recording.endswith("|"):
        what = f"utterance {name!r}: wav.scp holds a command, which is never run: write its output to a file, name that"
        return Raw(where, None, what)
    if not recording and name not in whole.speech:
        lacking.insert(0, "wav.scp")
    if lacking:
        return Raw(where, None, f"utterance {name!r} is missing in {' and '.join(lacking)}")
    text, speaker, instruct = (whole.tables[table].values.get(name) for table in ("text", "utt2spk", "instruct"))
    row = {"id": name, "text": text, "speaker": speaker, "instruct": instruct}
    row["speaker_vector"] = whole.utterance_vectors.get(name) or whole.speaker_vectors.get(speaker or "")
    sound = {
        "speech": whole.speech.get(name) or None,
        "audio": str(located(recording, path.absolute())) if recording else None,
    }
    rejected = whole.rejected.get(name)
    return Raw(where, row | (sound if rejected is None else {"pair": {"chosen": sound, "rejected": rejected}}))


def _table(path: Path, faults: list[Fault]) -> _Table:
    """Lines of a name, white space and the rest."""
    if not path.is_file():
        return _Table()
    values: dict[str, str] = {}
    lines: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            name, *rest = line.decode("utf-8-sig" if number == 1 else "utf-8").split(maxsplit=1) or [""]
        except UnicodeDecodeError as error:
            faults.append(Fault(f"{path}:{number}", f"not UTF-8: {error}"))
            continue
        if name in values:
            faults.append(Fault(f"{path}:{number}", f"utterance {name!r} stands already in {lines[name]}"))
        elif name and rest:
            values[name], lines[name] = rest[0].strip(), f"{path}:{number}"
    return _Table(values, lines, True)


def _numbers(path: Path, faults: list[Fault]) -> Mapping[str, Any]:
    """A saved dictionary of lists, or of tensors; empty without the file."""
    if not path.is_file():
        return {}
    import torch

    try:
        saved = load_tensors(path)
    except ReadError as error:
        faults.append(Fault(str(path), f"not a file of torch.save: {error.what}"))
        return {}
    if not isinstance(saved, dict):
        faults.append(Fault(str(path), f"expected a dictionary of lists, got {type(saved).__name__}"))
        return {}
    return {str(name): value.tolist() if isinstance(value, torch.Tensor) else value for name, value in saved.items()}
