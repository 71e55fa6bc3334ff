# SPDX-License-Identifier: Apache-2.0
"""Listen to candidates and write down what was heard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tts_align.evaluation.candidates import Candidate, read_candidates
from tts_align.evaluation.listening import MAX_FAILED_SHARE, Failures, listen, listener_digest, warn_of_failures
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.utils.progress import bar
from tts_align.utils.shards import Shards, digest
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
) -> Path:
    """Listen to every candidate, and write error rates and readings to one file.

    What is finished when the process is killed is kept: the same call resumes from there. A candidate that cannot be
    judged keeps its row, with the reason under ``error``, and is counted and named; called again, it is tried again.

    Args:
        module: module whose judge listens, and whose vocoder speaks if the judge hears sound.
        candidates: JSONL file that ``sample`` wrote.
        out: JSONL file of judged candidates to write, whole or not at all.
        batch_rows: candidates judged together; does not change the verdicts.
        rank: number of this process.
        world: number of processes that share the work.
        overwrite: whether to replace a file that was made from other candidates or with another judge.
        barrier: waits for the other processes.
        max_failed_share: largest share of each process's candidates that may go without a verdict.

    Raises:
        ValueError: no judge is configured, more candidates failed than may, or rows of another process are missing.
    """
    if module.judge is None:
        raise ValueError("no judge configured: the recipe must set model.judge")
    rows = read_candidates(candidates)
    key = digest("judge", listener_digest(module), [(row.id, row.speech) for row in rows])
    shards = Shards(out, key, [row.id for row in rows], rank, world, overwrite)
    again = {*shards.missing, *(name for name, row in shards.rows.items() if row.get("error"))}
    mine = [row for row in rows[rank::world] if row.id in again]
    share = len(rows[rank::world])
    with bar(share, share - len(mine), "judge", rank) as shown, finishing():
        for batch in listen(module.judge, module.vocoder, mine, batch_rows, Failures(share, max_failed_share)):
            shards.append(candidate.to_row() for candidate in batch)
            shown.advance(len(batch))
            check()
    shards.merge(barrier, rank)
    if rank == 0:
        warn_of_failures([Candidate.from_row(row) for row in shards.rows.values()])
    return Path(out)
