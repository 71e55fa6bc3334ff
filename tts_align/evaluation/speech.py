# SPDX-License-Identifier: Apache-2.0
"""What ``test`` does: speak sentences before and after training with the same seeds, judge, and show the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from tts_align.evaluation.audio import write_pair
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.listening import MAX_FAILED_SHARE, Failures, speak_and_judge, warn_of_failures
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.report import JudgedUtterance, System, print_table, write_report
from tts_align.evaluation.speaking import (
    UtteranceRequest,
    chosen_speakers,
    evenly_spread,
    utterance_requests,
    waveforms_of,
)
from tts_align.models.base.policy import CodecLM
from tts_align.utils.distributed import gathered
from tts_align.utils.seeds import part_seed


@dataclass(frozen=True)
class TestSettings:
    """What ``test`` speaks.

    Args:
        prompts: file of sentences, none of which was trained on: JSONL, or plain text with one sentence per line; demo:
            names an embedded one.
        speakers: voices to speak in; by default the only one there is. A sentence that names its own is spoken in that
            one only.
        samples: utterances per sentence and voice.
        sentences: number of sentences to test, evenly spread, for trials; all by default.
        seed: seed of all utterances, the same before and after; by default 1 plus that of the run (seed_everything).
        batch_rows: utterances spoken together; does not change them.
        audio: number of sentences whose sound is kept, before and after, those whose reading changed first.
        max_failed_share: largest share of a system's utterances that may go without a verdict because vocoder or judge
            failed on them; they are left out of all numbers, counted and named.
    """

    __test__ = False  # not a test, whatever its name

    prompts: str
    speakers: tuple[str, ...] = ()
    samples: int = 1
    sentences: int | None = None
    seed: int | None = None
    batch_rows: int = 128
    audio: int = 4
    max_failed_share: float = MAX_FAILED_SHARE

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.samples < 1 or self.batch_rows < 1 or (self.sentences is not None and self.sentences < 1):
            raise ValueError("model.test: samples, batch_rows and sentences must be at least 1")


class Evaluation:
    """One test of a policy.

    Args:
        module: its policy is the aligned system; its vocoder and judge are used.
        reference: the system before training; ``None`` for the policy without its adapter, or for none at all when
            it has no adapter.
        settings: what is spoken.
    """

    def __init__(self, module: SpeaksAndListens, reference: CodecLM | None, settings: TestSettings) -> None:
        self.module, self.reference, self.settings = module, reference, settings
        self.judged: dict[System, list[Candidate]] = {"base": [], "aligned": []}
        self._failures: dict[System, Failures] = {}

    def loader(self, rank: int, world: int) -> DataLoader[Sequence[UtteranceRequest]]:
        """This rank's utterances in batches of sentences of like length."""
        settings = self.settings
        prompts = evenly_spread(read_prompts(settings.prompts), settings.sentences)
        policy, vocoder = self.module.policy, self.module.vocoder
        voices = chosen_speakers(policy, vocoder, prompts, settings.speakers, "model.test.speakers")
        items = utterance_requests(prompts, voices, settings.samples, part_seed(settings.seed, 1))
        mine = sorted(items[rank::world], key=lambda item: len(item.prompt.text))
        self._failures = {system: Failures(len(mine), settings.max_failed_share) for system in self.judged}
        batches = [mine[i : i + settings.batch_rows] for i in range(0, len(mine), settings.batch_rows)]
        # Cut over ranks already: a trainer leaves this kind of sampler alone, whatever use_distributed_sampler says.
        whole: DistributedSampler[Any] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(batches, batch_size=None, sampler=whole, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def step(self, batch: Sequence[UtteranceRequest]) -> None:
        """Speak and judge one batch with both systems."""
        policy = self.module.policy
        if self.reference is not None:
            self._hear("base", self.reference, batch)
        elif policy.adapted:
            with policy.without_adapter():
                self._hear("base", policy, batch)
        self._hear("aligned", policy, batch)

    def _hear(self, system: System, model: CodecLM, batch: Sequence[UtteranceRequest]) -> None:
        failures = self._failures[system]
        self.judged[system] += speak_and_judge(model, self.module, batch, len(batch), failures=failures)

    def finish(self, directory: Path, first: bool = True) -> None:
        """Gather all ranks; the first writes and prints.

        Args:
            directory: of the run.
            first: whether this rank is the first.
        """
        everything = gathered(self.judged)
        if first:
            joined = {system: [one for part in everything for one in part[system]] for system in self.judged}
            self._write(directory / "test", joined)

    def _write(self, directory: Path, judged: dict[System, list[Candidate]]) -> None:
        audio = self._audio(directory / "audio", judged)
        utterances = [
            JudgedUtterance.of(one, system, audio.get((system, one.id), ""))
            for system, candidates in judged.items()
            for one in candidates
        ]
        for candidates in judged.values():
            warn_of_failures(candidates)
        summary = write_report(directory, utterances)
        print()  # the progress bar has left the line open
        print_table(summary)

    def _audio(self, folder: Path, judged: dict[System, list[Candidate]]) -> dict[tuple[str, str], str]:
        """Keep the sound of some sentences before and after; where the reading changed first."""
        vocoder = self.module.vocoder
        if vocoder is None or not self.settings.audio:
            return {}
        after = {one.id: one for one in judged["aligned"]}
        pairs = [(one, after[one.id]) for one in judged["base"] if one.id in after and one.speech]
        pairs = [pair for pair in pairs if pair[1].speech]
        pairs.sort(key=lambda pair: (_reading(pair[0]) == _reading(pair[1]), pair[0].id))
        kept = {}
        for before, aligned in pairs[: self.settings.audio]:
            sounds = waveforms_of(vocoder, (before, aligned))
            waveforms = {system: sound.numpy() for system, sound in zip(("base", "aligned"), sounds, strict=True)}
            for system, path in write_pair(folder, before.id, waveforms, vocoder.sample_rate).items():
                kept[system, before.id] = str(path.relative_to(folder.parent))
        return kept


def _reading(candidate: Candidate) -> str:
    return "" if candidate.verdict is None else str(candidate.verdict.reading)


def _as_it_is(batch: Sequence[UtteranceRequest]) -> Sequence[UtteranceRequest]:
    return batch
