# SPDX-License-Identifier: Apache-2.0
"""Measure how well a recipe's judge tells readings apart, on sound whose reading is known."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tts_align.evaluation.calibration import (
    Calibration,
    KnownUtterance,
    hear,
    is_recorded,
    load_known,
    read_recordings,
    tally,
    word_of,
    write_calibration,
    written_out,
)
from tts_align.evaluation.judges.base import Judge, Reading, Verdict
from tts_align.evaluation.judges.recogniser import RecogniserJudge
from tts_align.evaluation.listening import speech_samples
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.readings.lexicon import Lexicon
from tts_align.evaluation.speaking import speak, utterance_requests
from tts_align.utils.assets import resolve
from tts_align.utils.audio import AudioError
from tts_align.utils.distributed import gathered
from tts_align.utils.messages import say
from tts_align.utils.progress import bar

log = logging.getLogger(__name__)
_Answer = tuple[str, Reading | None]
"""Word and reading, and what was heard; ``None`` if there is no verdict."""


def calibrate(
    module: SpeaksAndListens,
    source: str | Path,
    out: Path,
    speakers: Sequence[str] = (),
    batch_rows: int = 64,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
) -> Calibration:
    """Let the judge listen to what is known, and store how often it was right.

    Args:
        module: its judge is measured; its policy and vocoder speak where there are no recordings.
        source: recordings with their reading (a JSONL file with a column ``audio``, or a folder with
            ``recordings.jsonl``), or sentences with marked words, which the policy speaks with each reading written
            out.
        out: JSON file to write.
        speakers: voices for sentences that name none.
        batch_rows: utterances at a time.
        seed: of what is spoken.
        rank: number of this process.
        world: number of processes that share the work.
        barrier: waits for the other processes.

    Raises:
        ValueError: no judge is configured, or nothing can be spoken.
    """
    if module.judge is None:
        raise ValueError("no judge configured: the recipe must set model.judge")
    path = resolve(source)
    recorded = is_recorded(path)
    answers: list[_Answer] = []
    unspoken = 0
    if recorded:
        rows = read_recordings(path)[rank::world]
        with bar(len(rows), 0, "calibrate", rank) as shown:
            for batch in _batches(rows, batch_rows):
                answers += _of_recordings(module.judge, batch)
                shown.advance(len(batch))
    else:
        judge = module.judge
        lexicon = judge.lexicon if isinstance(judge, RecogniserJudge) else Lexicon()
        language = judge.language if isinstance(judge, RecogniserJudge) else ""
        prompts = [prompt for prompt in read_prompts(path) if prompt.spans]
        pairs = [pair for prompt in prompts for pair in written_out(prompt, language, lexicon)]
        wanted = sum(len({*prompt.spans[0].right, *prompt.spans[0].wrong}) for prompt in prompts)
        unspoken = wanted - len(pairs)
        if not pairs:
            raise ValueError(
                f"{source}: no reading can be written out: expected sentences with spans and a language (ja, zh, en), "
                "spellings in a lexicon (model.judge.init_args.readings.lexicon), or recordings with a column audio"
            )
        originals = {spoken.id: original for spoken, original in pairs}
        items = utterance_requests([spoken for spoken, _ in pairs], speakers, 1, seed)[rank::world]
        with bar(len(items), 0, "calibrate", rank) as shown:
            for candidates in speak(module.policy, module.sampling, items, batch_rows):
                known = [dataclasses.replace(one, prompt=originals[one.prompt.id]) for one in candidates]
                silent = [one for one in known if not one.speech]
                answers += [(f"{word_of(one.prompt)}/{one.prompt.right[0]}", Reading.NEITHER) for one in silent]
                known = [one for one in known if one.speech]
                samples = speech_samples(module.vocoder if judge.needs_audio else None, known)
                answers += _answered(
                    judge,
                    [
                        KnownUtterance(sample, one.prompt.expected, word_of(one.prompt))
                        for sample, one in zip(samples, known, strict=True)
                    ],
                )
                shown.advance(len(candidates))
    words, failed = tally(one for part in gathered(answers) for one in part)
    found = Calibration(module.judge.identity(), "recordings" if recorded else "policy", words, failed, unspoken)
    if rank == 0:
        write_calibration(out, found)
        say(f"judge:        {found}")
        say(f"stored in:    {out}")
    if barrier is not None:
        barrier()
    return found


def _batches(rows: Sequence, size: int) -> Iterator[list]:
    items = iter(rows)
    while batch := list(islice(items, size)):
        yield batch


def _of_recordings(judge: Judge, rows: Sequence) -> list[_Answer]:
    known, answers = [], []
    for prompt, audio in rows:
        try:
            known.append(load_known(prompt, audio))
        except AudioError as error:
            log.warning("%s", error)
            answers.append((f"{word_of(prompt)}/{prompt.right[0]}", None))
    return answers + _answered(judge, known)


def _answered(judge: Judge, known: Sequence[KnownUtterance]) -> list[_Answer]:
    answers: list[_Answer] = []
    for one, verdict in zip(known, hear(judge, known), strict=True):
        if isinstance(verdict, Verdict):
            answers.append((one.name, verdict.reading))
        else:
            log.warning("%s could not be judged: %s", one.name, verdict)
            answers.append((one.name, None))
    return answers
