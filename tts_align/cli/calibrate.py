# SPDX-License-Identifier: Apache-2.0
"""Measure how well a recipe's judge tells readings apart, on sound whose reading is known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from tts_align.utils.messages import say
from tts_align.utils.progress import bar
from tts_align.utils.shards import Shards, digest
from tts_align.utils.signals import check, finishing

log = logging.getLogger(__name__)


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
    """Let the judge listen to what is known, and store how often it was right; resumes.

    Args:
        module: its judge is measured; its policy and vocoder speak where there are no recordings.
        source: recordings with their reading (a JSONL file with a column ``audio``, or a folder with
            ``recordings.jsonl``), or sentences with marked words, which the policy speaks with each reading written
            out.
        out: JSON file to write; what was heard in each utterance stands beside it (.jsonl).
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
    heard = _Heard(module.judge, out.with_suffix(".jsonl"), batch_rows, rank, world)
    if recorded:
        heard.listen_to_recordings(read_recordings(path))
        unspoken = 0
    else:
        pairs, unspoken = _written_out(path, module.judge)
        heard.listen_to_policy(module, pairs, speakers, seed)
    complete = heard.shards.merge(barrier, rank)
    rows = heard.shards.rows.values()
    words, failed = tally((row["word"], Reading(row["reading"]) if row.get("reading") else None) for row in rows)
    found = Calibration(module.judge.identity(), "recordings" if recorded else "policy", words, failed, unspoken)
    if complete and (rank == 0 or barrier is None):
        write_calibration(out, found)
        say(f"judge:        {found}")
        say(f"stored in:    {out}")
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


class _Heard:
    """What one process listens to, and what was heard so far; a killed calibration resumes from it.

    Args:
        judge: who listens.
        out: JSONL file of what was heard.
        batch_rows: utterances at a time.
        rank: number of this process.
        world: number of processes.
    """

    shards: Shards

    def __init__(self, judge: Judge, out: Path, batch_rows: int, rank: int, world: int) -> None:
        self.judge, self.out, self.batch_rows, self.rank, self.world = judge, out, batch_rows, rank, world

    def _begin(self, ids: Sequence[str], made_with: object) -> set[str]:
        """Read what was heard before; the names of what is still to be heard."""
        key = digest("calibrate", sorted(self.judge.identity().items()), made_with)
        self.shards = Shards(self.out, key, ids, self.rank, self.world, overwrite=True)
        return {*self.shards.missing, *(name for name, row in self.shards.rows.items() if row.get("error"))}

    def listen_to_recordings(self, recordings: Sequence[tuple[SentencePrompt, Path]]) -> None:
        """Listen to this process's share of recordings."""
        sizes = [(prompt.id, prompt.right, audio.is_file() and audio.stat().st_size) for prompt, audio in recordings]
        again = self._begin([prompt.id for prompt, _ in recordings], sizes)
        mine = [one for one in recordings[self.rank :: self.world] if one[0].id in again]
        with bar(len(mine), 0, "calibrate", self.rank) as shown, finishing():
            for start in range(0, len(mine), self.batch_rows):
                batch = mine[start : start + self.batch_rows]
                known: dict[str, KnownUtterance] = {}
                for prompt, audio in batch:
                    try:
                        known[prompt.id] = load_known(prompt, audio)
                    except AudioError as error:
                        self._keep(prompt.id, _name(prompt), str(error))
                self._judge(known)
                shown.advance(len(batch))
                check()

    def listen_to_policy(
        self,
        module: SpeaksAndListens,
        pairs: Sequence[tuple[SentencePrompt, SentencePrompt]],
        speakers: Sequence[str],
        seed: int,
    ) -> None:
        """Let the policy speak this process's share, and listen to it."""
        originals = {spoken.id: original for spoken, original in pairs}
        items = utterance_requests([spoken for spoken, _ in pairs], speakers, 1, seed)
        voice = module.vocoder.digest() if module.vocoder is not None else ""
        texts = [(item.id, item.prompt.text) for item in items]
        again = self._begin(
            [item.id for item in items], (module.policy.speech_digest(), voice, module.sampling, seed, texts)
        )
        mine = [item for item in items[self.rank :: self.world] if item.id in again]
        with bar(len(mine), 0, "calibrate", self.rank) as shown, finishing():
            for candidates in speak(module.policy, module.sampling, mine, self.batch_rows):
                loud = [one for one in candidates if one.speech]
                for one in candidates:
                    if not one.speech:
                        self._keep(one.id, _name(originals[one.prompt.id]), Reading.NEITHER)
                samples = speech_samples(module.vocoder if self.judge.needs_audio else None, loud)
                known = {}
                for one, sample in zip(loud, samples, strict=True):
                    prompt = originals[one.prompt.id]
                    known[one.id] = KnownUtterance(sample, prompt.expected, word_of(prompt))
                self._judge(known)
                shown.advance(len(candidates))
                check()

    def _judge(self, known: Mapping[str, KnownUtterance]) -> None:
        for (name, one), verdict in zip(known.items(), hear(self.judge, list(known.values())), strict=True):
            self._keep(name, one.name, verdict if isinstance(verdict, str) else verdict.reading)

    def _keep(self, name: str, word: str, answer: Reading | str) -> None:
        """Note what was heard, or why nothing was."""
        if isinstance(answer, Reading):
            self.shards.append([{"id": name, "word": word, "reading": str(answer)}])
            return
        log.warning("%s could not be judged: %s", name, answer)
        self.shards.append([{"id": name, "word": word, "error": answer}])


def _name(prompt: SentencePrompt) -> str:
    return f"{word_of(prompt)}/{prompt.right[0]}"
