# SPDX-License-Identifier: Apache-2.0
"""Turn recordings and texts into a manifest that training reads: with tokens, speaker vectors, prompt speech tokens."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from tts_align.cli.devices import of_the_trainer
from tts_align.cli.places import check_no_hub
from tts_align.cli.trainer import AlignTrainer
from tts_align.cli.writing import writing
from tts_align.data.cosyvoice import is_place, shard_of
from tts_align.data.manifest import read_manifest, to_dict
from tts_align.data.places import locate
from tts_align.data.prepared import OnBadRow, Target, finish
from tts_align.data.recording_encoder import RecordingEncoder, encode_recordings, needed
from tts_align.data.recording_encoder import Refused as RefusedRow
from tts_align.data.recordings import Limits, Recordings
from tts_align.data.records import Fault, Manifest, ManifestError, Pair, Row, folder
from tts_align.data.refused import Refused
from tts_align.utils.files import check_not_source
from tts_align.utils.lazy import Lazy
from tts_align.utils.messages import quiet
from tts_align.utils.progress import bar
from tts_align.utils.shards import Shards, digest
from tts_align.utils.signals import check, finishing

Item = TypeVar("Item")

_BATCHES_PER_WINDOW = 8
"""Recordings are encoded by length within this number of batches, which are also kept or lost together."""
_ROWS_OF_A_SHARD = 1024
"""Neighbours inside a shard go to one process: the file must be read from its beginning."""


@dataclass(frozen=True)
class Processes:
    """Where the work is done; options of Lightning's trainer.

    Args:
        accelerator: kind of device, such as auto, cpu or gpu.
        devices: number of devices on each machine, or which of them; auto for all.
        num_nodes: number of machines.
        strategy: way in which Lightning starts and joins the processes.
    """

    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"

    def trainer(self) -> AlignTrainer:
        """A trainer that does nothing but start the processes."""
        options = asdict(self)
        with of_the_trainer(options):
            return AlignTrainer(
                **options,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )


class _Nobody(LightningModule):
    """Takes the place of a model: this command trains and asks none."""


def prepare(
    directory: str,
    source: str,
    out: Path,
    max_seconds: float = 30.0,
    min_seconds: float = 0.1,
    lowest_rate: int = 16000,
    speaker_vectors: bool = True,
    batch_size: int = 8,
    num_workers: int = 4,
    on_bad_row: OnBadRow = "drop",
    desirable_stars: float | None = None,
    overwrite: bool = False,
    trainer: Processes | None = None,
) -> None:
    """Make a manifest of recordings and their texts: speech tokens, speech tokens of prompts, speaker vectors.

    What is finished when the process is killed is kept: the same command resumes from there, with any number of
    processes, and the result does not depend on either. Rows that cannot be prepared are counted, named with the
    reason in <out>.refused.jsonl, and left out.

    Args:
        directory: directory of a CosyVoice2 or Fun-CosyVoice3 model, whose speech tokenizer and speaker encoder are
            used.
        source: recordings and texts: a manifest (.jsonl, .parquet), a Kaldi-style folder (wav.scp, text, ...), or
            CosyVoice's Parquet shards: one, a directory of them, or their data.list.
        out: manifest to write, .jsonl or .parquet.
        max_seconds: longest recording that is taken, in seconds.
        min_seconds: shortest recording that is taken, in seconds.
        lowest_rate: lowest sample rate of a recording that is taken, in Hz.
        speaker_vectors: whether to make speaker vectors for rows that have a recording and none yet.
        batch_size: recordings encoded together, if the directory has a speech tokenizer for batches.
        num_workers: threads in each process that read recordings ahead.
        on_bad_row: reaction to a row that cannot be prepared: drop it and say so, or stop.
        desirable_stars: number of stars from which on a row is desirable, for labels that are 1 to 5 stars.
        overwrite: whether to replace a file that was made with other settings or inputs.
        trainer: where the work is done.
    """
    quiet()
    check_no_hub("directory", directory)
    target = Target(Path(out), overwrite, on_bad_row, desirable_stars)
    recording_encoder = RecordingEncoder.of(directory, batch_size, speaker_vectors)
    limits = Limits(max_seconds, min_seconds, lowest_rate)
    longest = recording_encoder.tokenizer.max_seconds
    if longest is not None and max_seconds > longest:
        raise ValueError(f"max_seconds must be at most {longest:g}, which is what the speech tokenizer takes")
    if min(batch_size, num_workers) < 1:
        raise ValueError(f"batch_size and num_workers must be at least 1, got {batch_size} and {num_workers}")
    share = partial(
        prepare_share,
        recording_encoder=recording_encoder,
        source=source,
        target=target,
        limits=limits,
        window=batch_size * _BATCHES_PER_WINDOW,
        threads=num_workers,
    )
    if isinstance(here := locate(source), Path):
        check_not_source(out, here)
    processes = (trainer or Processes()).trainer()  # which knows which of them is the first
    with writing(target.out, "prepare"):
        processes.work(_Nobody(), lambda _, **place: share(**place))


def prepare_share(
    recording_encoder: RecordingEncoder,
    source: str,
    target: Target,
    limits: Limits,
    window: int,
    threads: int = 1,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
) -> None:
    """Prepare one process's share of the rows; the last one writes the manifest.

    Args:
        recording_encoder: what listens.
        source: see :func:`prepare`.
        target: what is written, and how.
        limits: which recordings are taken.
        window: rows that are worked on together; the same windows always hold the same rows, so that no result depends
            on what was there already.
        threads: that read recordings.
        rank: number of this process.
        world: how many processes share the work.
        barrier: waits for the other processes.
    """
    path = locate(source)
    codebook = recording_encoder.tokenizer.codebook_size
    left_out = Refused()
    given = read_manifest(
        path, target.on_bad_row, codebook, False, True, target.desirable_stars, target.tables, left_out
    )
    speaks = recording_encoder.speaker_encoder is not None
    stamps = [_stamp(row, given, speaks) for row in given.rows]
    key = digest("prepare", recording_encoder.identity, limits, speaks, window)
    more = (digest(*left_out),) if left_out.count > len(given.dropped) else ()
    made_with = digest(key, stamps, tuple(given.dropped), *more)
    if target.is_finished(made_with):
        return
    shards = Shards(target.work, key, stamps, rank, world, overwrite=True)
    windows = [range(start, min(start + window, len(stamps))) for start in range(0, len(stamps), window)]
    inside = any(is_place(name) for row in given.rows for name in needed(row, speaks))
    mine = _share(windows, rank, world, _ROWS_OF_A_SHARD // window if inside else 1)
    todo = [some for some in mine if any(stamps[number] not in shards.rows for number in some)]

    def names_of(number: int) -> list[str]:
        rows = given.rows[todo[number].start : todo[number].stop]
        return list(dict.fromkeys(name for row in rows for name in needed(row, speaks)))

    names = Lazy(len(todo), names_of)
    recordings = Recordings(folder(path), recording_encoder.tokenizer.sample_rate, limits, threads)
    if any(names):
        recording_encoder.try_out()
    total = sum(map(len, mine))
    with bar(total, total - sum(map(len, todo)), "prepare", rank) as shown, finishing():
        for some, sounds in zip(todo, recordings.windows(names), strict=True):
            rows = given.rows[some.start : some.stop]
            made = encode_recordings(rows, sounds, recording_encoder)
            shards.append(_lines([stamps[number] for number in some], rows, made, given, target))
            shown.advance(len(some))
            check()
    if shards.merge(barrier, rank) and (rank == 0 or barrier is None):
        finish(target, lambda: (shards.rows[stamp] for stamp in stamps), given, left_out, made_with)
        for leftover in (shards.folder, target.tables):
            shutil.rmtree(leftover, ignore_errors=True)
    left_out.close()


def _stamp(row: Row, given: Manifest, speaker_vectors: bool) -> str:
    """Name of a row that changes with everything it is made of: its columns, and the files of its recordings."""
    paths = [shard_of(name) if is_place(name) else given.find(name) for name in needed(row, speaker_vectors)]
    states = [path.stat() if path.is_file() else None for path in paths]
    return digest(to_dict(row), [state and (state.st_size, state.st_mtime_ns) for state in states])


def _share(windows: Sequence[Item], rank: int, world: int, together: int) -> list[Item]:
    """Every ``world``-th run of neighbouring windows, from that of ``rank`` on."""
    run = max(1, min(together, math.ceil(len(windows) / world)))
    return [window for number, window in enumerate(windows) if number // run % world == rank]


def _lines(
    stamps: Sequence[str], rows: Sequence[Row], heard: Sequence[Row | RefusedRow], given: Manifest, target: Target
) -> Iterator[dict[str, Any]]:
    """How results are kept until all are there; raises at the first that is refused, if so it shall be."""
    for stamp, old, row in zip(stamps, rows, heard, strict=True):
        if isinstance(row, Row):
            yield {"id": stamp, "row": to_dict(_moved(row, folder(given.path), target.out.parent))}
        elif target.on_bad_row == "stop":
            raise ManifestError(given.path, [Fault(f"row {old.id!r}", f"{row.where}: {row.what}")])
        else:
            yield {"id": stamp, "refused": asdict(row)}


def _moved(row: Row, old: Path, new: Path) -> Row:
    """The row with its relative paths starting from another folder; what lies inside a shard has no path."""

    def path(audio: str) -> str:
        if not audio or is_place(audio):
            return ""
        return audio if Path(audio).is_absolute() else Path(os.path.relpath(old / audio, new)).as_posix()

    sides = [replace(sound, audio=path(sound.audio)) for sound in row.sounds]
    return replace(
        row,
        audio="" if row.pair else sides[0].audio,
        pair=Pair(*sides) if row.pair else None,
        prompt_audio=path(row.prompt_audio),
    )
