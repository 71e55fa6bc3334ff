# SPDX-License-Identifier: Apache-2.0
"""Speak every sentence several times in every voice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import stream_prompts
from tts_align.evaluation.speaking import (
    ReadTexts,
    UtteranceRequests,
    check_speakers,
    chosen_speakers,
    speak,
    write_sound,
)
from tts_align.utils.files import write_json
from tts_align.utils.progress import bar
from tts_align.utils.readers import ReadError, read_json
from tts_align.utils.seeds import part_seed
from tts_align.utils.shards import Shards, streamed_digest
from tts_align.utils.signals import check, finishing


def sample(
    module: SpeaksAndListens,
    prompts: str | Path,
    out: Path,
    samples: int = 5,
    speakers: Sequence[str] = (),
    batch_rows: int = 64,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
    overwrite: bool = False,
    audio: bool = False,
    barrier: Callable[[], None] | None = None,
) -> Path:
    """Speak every sentence several times in every voice, and write the utterances to one file.

    What is finished when the process is killed is kept: the same call resumes from there, with any number of processes.

    Args:
        module: module whose policy speaks, as its sampling says.
        prompts: file of sentences: JSONL, or plain text with one sentence per line.
        out: JSONL file of candidates to write, whole or not at all.
        samples: utterances per sentence and voice.
        speakers: voices to speak in; by default the only one there is. A sentence that names its own is spoken in that
            one only.
        batch_rows: utterances spoken together on each device; does not change them.
        seed: seed of all utterances; that of the run (seed_everything) by default.
        rank: number of this process.
        world: number of processes that share the work.
        overwrite: whether to replace a file that was made with other settings.
        audio: whether to write a WAV file of each utterance, made by the module's vocoder, in a folder beside ``out``
            that has its name: drawn.jsonl and drawn.jsonl.audio.
        barrier: waits for the other processes.

    Raises:
        ValueError: sound is wanted without a vocoder, or a voice that the policy does not know.
    """
    if samples < 1 or batch_rows < 1:
        raise ValueError(f"samples and batch_rows must be at least 1, got {samples} and {batch_rows}")
    vocoder = module.vocoder if audio else None
    if audio and vocoder is None:
        raise ValueError("nothing to make sound with: the recipe must set model.vocoder, or leave out --audio")
    seed = part_seed(seed)
    sentences = stream_prompts(prompts)
    voices = chosen_speakers(module.policy, module.vocoder, sentences, speakers, "--speakers")
    items = UtteranceRequests(sentences, voices, samples, seed)
    check_speakers(module.policy, items, module.vocoder)
    if vocoder is not None:
        vocoder.check_speakers(dict.fromkeys(item.speaker for item in items))
    sound = () if vocoder is None else ("audio", vocoder.digest())
    # What is read, not only what is written in the file: a voice of the same name may be another one now.
    read = ReadTexts(module.policy, items)
    key = streamed_digest(
        "sample", module.policy.speech_digest(), module.sampling, sentences, read, samples, seed, *sound
    )
    shards = Shards(out, key, [item.id for item in items], rank, world, overwrite)
    recordings = recordings_of(out)
    mine = items[rank::world].without(shards.rows)
    share = len(items[rank::world])
    with bar(share, share - len(mine), "sample", rank) as shown, finishing():
        for batch in speak(module.policy, module.sampling, mine, batch_rows, shown.advance, read):
            files = {} if vocoder is None else write_sound(module, batch, recordings, recordings.parent)
            shards.append(row | files.get(row["id"], {}) for row in (candidate.to_row() for candidate in batch))
            check()
    if shards.merge(barrier, rank) and (rank == 0 or barrier is None):
        remove_stale(recordings, shards.rows.values())
    return Path(out)


WRITTEN = ".written.json"
"""File in a folder of recordings that lists those which ``sample`` wrote."""


def recordings_of(out: Path) -> Path:
    """Folder of the recordings that belong to a file of candidates.

    >>> recordings_of(Path("work/drawn.jsonl")).as_posix()
    'work/drawn.jsonl.audio'
    """
    return Path(out).with_name(f"{Path(out).name}.audio")


def remove_stale(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Remove recordings of earlier candidates: those that this command wrote and no row of the finished file names.

    Args:
        folder: of the recordings; files that this command did not write stay.
        rows: of the candidates.
    """
    named = {Path(row["audio"]).name for row in rows if "audio" in row}
    note = folder / WRITTEN
    for name in _written(note) - named:
        if os.path.isfile(path := folder / Path(name).name):  # which, unlike pathlib's, takes any name
            path.unlink(missing_ok=True)
    if named:
        write_json(note, sorted(named))
    elif note.is_file():
        note.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _written(note: Path) -> set[str]:
    """Names in the list of written recordings; a file that holds anything else counts as none."""
    try:
        names = read_json(note)
    except (ReadError, FileNotFoundError):
        return set()
    return set(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else set()
