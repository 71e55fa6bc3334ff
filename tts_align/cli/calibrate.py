# SPDX-License-Identifier: Apache-2.0
"""Measure how well a recipe's judge tells readings apart, on sound whose reading is known."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.evaluation.calibration import Calibration, tally, write_calibration
from tts_align.evaluation.judges.base import Judge, Reading
from tts_align.evaluation.judges.recogniser import RecogniserJudge
from tts_align.evaluation.known_utterances import (
    KnownUtterance,
    hear,
    is_recorded,
    load_known,
    read_recordings,
    word_of,
    written_out,
)
from tts_align.evaluation.listening import speech_samples
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import SentencePrompt, read_prompts
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
    if recorded and not module.judge.needs_audio:
        raise ValueError(
            f"{type(module.judge).__name__} reads speech tokens: calibrate it on sentences, not recordings"
        )
    if not recorded and module.judge.needs_audio and module.vocoder is None:
        raise ValueError(f"{type(module.judge).__name__} hears sound: the recipe must set model.vocoder")
    share = _Share(module.judge, batch_rows, rank, world)
    if recorded:
        answers, unspoken = share.of_recordings(read_recordings(path)), 0
    else:
        pairs, unspoken = _written_out(path, module.judge)
        answers = share.of_policy(module, pairs, speakers, seed)
    words, failed = tally(one for part in gathered(answers) for one in part)
    found = Calibration(module.judge.identity(), "recordings" if recorded else "policy", words, failed, unspoken)
    if rank == 0:
        write_calibration(out, found)
        say(f"judge:        {found}")
        say(f"stored in:    {out}")
    if barrier is not None:
        barrier()
    return found


def _written_out(path: Path, judge: Judge) -> tuple[list[tuple[SentencePrompt, SentencePrompt]], int]:
    """What is spoken and what is known of it, and the number of readings that cannot be written out."""
    known = (judge.language, judge.lexicon) if isinstance(judge, RecogniserJudge) else ("", Lexicon())
    prompts = [prompt for prompt in read_prompts(path) if prompt.spans]
    pairs = [pair for prompt in prompts for pair in written_out(prompt, *known)]
    if not pairs:
        raise ValueError(
            f"{path}: no reading can be written out: expected sentences with spans and a language (ja, zh, en), "
            "spellings in a lexicon (model.judge.init_args.readings.lexicon), or recordings with a column audio"
        )
    wanted = sum(len({*prompt.spans[0].right, *prompt.spans[0].wrong}) for prompt in prompts)
    return pairs, wanted - len(pairs)


@dataclass(frozen=True)
class _Share:
    """What one process listens to.

    Args:
        judge: who listens.
        batch_rows: utterances at a time.
        rank: number of this process.
        world: number of processes.
    """

    judge: Judge
    batch_rows: int
    rank: int
    world: int

    def of_recordings(self, recordings: Sequence[tuple[SentencePrompt, Path]]) -> list[_Answer]:
        """Answers to this process's share of recordings."""
        mine = recordings[self.rank :: self.world]
        answers: list[_Answer] = []
        with bar(len(mine), 0, "calibrate", self.rank) as shown:
            for start in range(0, len(mine), self.batch_rows):
                known = []
                for prompt, audio in mine[start : start + self.batch_rows]:
                    try:
                        known.append(load_known(prompt, audio))
                    except AudioError as error:
                        log.warning("%s", error)
                        answers.append((_name(prompt), None))
                answers += self._answers(known)
                shown.advance(min(self.batch_rows, len(mine) - start))
        return answers

    def of_policy(
        self,
        module: SpeaksAndListens,
        pairs: Sequence[tuple[SentencePrompt, SentencePrompt]],
        speakers: Sequence[str],
        seed: int,
    ) -> list[_Answer]:
        """Answers to what the policy speaks of this process's share."""
        originals = {spoken.id: original for spoken, original in pairs}
        items = utterance_requests([spoken for spoken, _ in pairs], speakers, 1, seed)[self.rank :: self.world]
        answers: list[_Answer] = []
        with bar(len(items), 0, "calibrate", self.rank) as shown:
            for candidates in speak(module.policy, module.sampling, items, self.batch_rows):
                spoken = [dataclasses.replace(one, prompt=originals[one.prompt.id]) for one in candidates]
                answers += [(_name(one.prompt), Reading.NEITHER) for one in spoken if not one.speech]
                loud = [one for one in spoken if one.speech]
                samples = speech_samples(module.vocoder if self.judge.needs_audio else None, loud)
                known = zip(samples, (one.prompt for one in loud), strict=True)
                answers += self._answers(
                    [KnownUtterance(sample, prompt.expected, word_of(prompt)) for sample, prompt in known]
                )
                shown.advance(len(candidates))
        return answers

    def _answers(self, known: Sequence[KnownUtterance]) -> list[_Answer]:
        answers: list[_Answer] = []
        for one, verdict in zip(known, hear(self.judge, known), strict=True):
            if isinstance(verdict, str):
                log.warning("%s could not be judged: %s", one.name, verdict)
            answers.append((one.name, None if isinstance(verdict, str) else verdict.reading))
        return answers


def _name(prompt: SentencePrompt) -> str:
    return f"{word_of(prompt)}/{prompt.right[0]}"
