# SPDX-License-Identifier: Apache-2.0
"""Listen to candidates and write down what was heard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tts_align.evaluation.calibration import accuracy_of, calibration_of, write_calibration
from tts_align.evaluation.candidate_file import CandidateFile
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge, Reading
from tts_align.evaluation.listening import (
    MAX_FAILED_SHARE,
    Failures,
    listen,
    listener_digest,
    needs_vocoder,
    warn_of_failures,
)
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.utils.assets import resolve
from tts_align.utils.lazy import Lazy
from tts_align.utils.messages import say
from tts_align.utils.progress import bar
from tts_align.utils.shards import Shards, listed_digest
from tts_align.utils.signals import check, finishing

log = logging.getLogger(__name__)


def judge(
    module: SpeaksAndListens,
    candidates: str | Path,
    out: Path,
    batch_rows: int = 64,
    rank: int = 0,
    world: int = 1,
    overwrite: bool = False,
    barrier: Callable[[], None] | None = None,
    max_failed_share: float = MAX_FAILED_SHARE,
    accuracy: Path | None = None,
) -> Path:
    """Listen to every candidate, and write error rates and readings to one file.

    Recordings that ``sample --audio`` wrote are listened to as they are; the sound of other candidates is made by the
    module's vocoder.

    What is finished when the process is killed is kept: the same call resumes from there. A candidate that cannot be
    judged keeps its row, with the reason under ``error``, and is counted and named; called again, it is tried again.

    Args:
        module: module whose judge listens, and whose vocoder speaks if the judge hears sound that was not recorded.
        candidates: JSONL file that ``sample`` wrote.
        out: JSONL file of judged candidates to write, whole or not at all.
        batch_rows: candidates judged together; does not change the verdicts.
        rank: number of this process.
        world: number of processes that share the work.
        overwrite: whether to replace a file that was made from other candidates or with another judge.
        barrier: waits for the other processes.
        max_failed_share: largest share of each process's candidates that may go without a verdict.
        accuracy: where the judge's own accuracy is kept, if it was measured; laid beside ``out`` for ``label``.

    Raises:
        ValueError: no judge is configured, more candidates failed than may, or rows of another process are missing.
    """
    if module.judge is None:
        raise ValueError("no judge configured: the recipe must set model.judge")
    start = resolve(candidates).parent
    rows = with_recordings(CandidateFile(candidates), start, module)
    shards = Shards(out, _listened_to(module, rows, start), rows.ids, rank, world, overwrite)
    again = {*shards.missing, *(name for name, row in shards.rows.items() if row.get("error"))}
    mine = rows.take([number for number in range(rank, len(rows), world) if rows.ids[number] in again])
    share = len(range(rank, len(rows), world))
    with bar(share, share - len(mine), "judge", rank) as shown, finishing():
        failures = Failures(share, max_failed_share)
        for batch in listen(module.judge, module.vocoder, mine, batch_rows, failures, start):
            shards.append(candidate.moved(start, Path(out).parent).to_row() for candidate in batch)
            shown.advance(len(batch))
            check()
    shards.merge(barrier, rank)
    if rank == 0:
        names = list(shards.rows)
        judged = Lazy(len(names), lambda number: Candidate.from_row(shards.rows[names[number]]))
        warn_of_failures(judged)
        if any(one.verdict and one.verdict.reading is not Reading.UNMARKED for one in judged):
            _show_accuracy(module.judge, accuracy, Path(out))
    return Path(out)


def _show_accuracy(listener: Judge, accuracy: Path | None, out: Path) -> None:
    """Say how far the judge can be trusted, and lay it beside its verdicts."""
    known = None if accuracy is None else calibration_of(accuracy, listener)
    beside = accuracy_of(out)
    if known is None:
        beside.unlink(missing_ok=True)
        say("judge:        its own accuracy is not known: measure it with tts-align judge --calibrate")
        return
    write_calibration(beside, known)
    say(f"judge:        {known}")


def with_recordings(rows: CandidateFile, start: Path, module: SpeaksAndListens) -> CandidateFile:
    """The candidates, without recordings that are named but not there if a vocoder can make them again; says so.

    Args:
        rows: candidates.
        start: folder that the paths of their recordings start from.
        module: whose vocoder speaks.
    """
    assert module.judge is not None
    if not module.judge.needs_audio or module.vocoder is None:
        return rows  # without a vocoder a recording that is not there is a fault of its candidate
    lost = [number for number, row in enumerate(rows) if row.audio and not Path(start, row.audio).is_file()]
    if lost:
        first = rows[lost[0]].audio
        log.warning(
            "%d of %d recordings are not where they were written, %s first: the vocoder makes their sound again",
            len(lost),
            sum(bool(row.audio) for row in rows),
            Path(start, first),
        )
    return rows.without_recordings(lost)


def _listened_to(module: SpeaksAndListens, rows: CandidateFile, start: Path) -> str:
    """Digest of everything that verdicts depend on."""
    assert module.judge is not None
    if not module.judge.needs_audio or not any(row.audio for row in rows):
        return listed_digest("judge", listener_digest(module), rows=((row.id, row.speech) for row in rows))
    made = needs_vocoder(rows, start) and module.vocoder is not None
    voice = module.vocoder.digest() if made and module.vocoder is not None else ""
    sounds = ((row.id, row.speech, row.audio and _size(Path(start, row.audio))) for row in rows)
    return listed_digest("judge", module.judge.identity(), voice, rows=sounds)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
