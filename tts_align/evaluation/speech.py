# SPDX-License-Identifier: Apache-2.0
"""What ``test`` does: speak sentences before and after training with the same seeds, listen, and show the difference.

In stages, each of which keeps its rows under ``test/stages`` and resumes from them: synthesise, transcribe, readings,
similarity, quality; then the report. A new measure needs no new synthesis, and another judge none either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from tts_align.evaluation.audio import keep_only, write_pair
from tts_align.evaluation.calibration import CALIBRATION, calibration_of
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.listening import warn_of_failures
from tts_align.evaluation.measures.base import describe
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.protocols import Protocol, find_protocol
from tts_align.evaluation.report import print_table, write_report
from tts_align.evaluation.settings import TestSettings
from tts_align.evaluation.speaking import (
    UtteranceRequest,
    chosen_speakers,
    encode,
    evenly_spread,
    utterance_requests,
    waveforms_of,
)
from tts_align.evaluation.stages.hearing import Listeners
from tts_align.evaluation.stages.scoring import Rows, judged_utterance
from tts_align.evaluation.stages.spoken import SpokenStages
from tts_align.evaluation.suites import Suite, SuiteItem, read_suite
from tts_align.evaluation.utterances import SYSTEMS
from tts_align.models.base.policy import CodecLM
from tts_align.utils.seeds import part_seed
from tts_align.utils.shards import digest

__all__ = ["Evaluation", "TestSettings"]

STAGES, VOICES = "stages", "voices.jsonl"
"""Folder of the stages' rows in ``test``, and the file of a test set's voices there."""


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
        self.suite: Suite
        self.items: dict[str, SuiteItem] = {}
        self.protocol: Protocol | None = None
        self._stages = SpokenStages(module, reference, [], [])

    def loader(self, rank: int, world: int) -> DataLoader[Sequence[UtteranceRequest]]:
        """This rank's utterances in batches of sentences of like length."""
        settings = self.settings
        self.suite = read_suite(settings.suite, settings.prompts, settings.language)
        self.items = {item.id: item for item in self.suite.items}
        self.protocol = self._protocol()
        prompts = evenly_spread([item.sentence for item in self.suite.items], settings.sentences)
        policy, vocoder = self.module.policy, self.module.vocoder
        voices = chosen_speakers(policy, vocoder, prompts, settings.speakers, "model.test.speakers")
        requests = utterance_requests(prompts, voices, settings.samples, part_seed(settings.seed, 1))
        mine = sorted(requests[rank::world], key=lambda item: len(item.prompt.text))
        self._stages = SpokenStages(self.module, self.reference, requests, mine, rank)
        batches = [mine[i : i + settings.batch_rows] for i in range(0, len(mine), settings.batch_rows)]
        # Cut over ranks already: a trainer leaves this kind of sampler alone, whatever use_distributed_sampler says.
        whole: DistributedSampler[Any] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(batches, batch_size=None, sampler=whole, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def _protocol(self) -> Protocol | None:
        """The protocol asked for, or the test set's own; a list of sentences has none."""
        name = self.settings.protocol or ("" if self.suite.name == "sentences" else self.suite.protocol)
        if not name:
            return None
        protocol = find_protocol(name)
        protocol.check(self.suite.languages)
        return protocol

    def begin(self, directory: Path) -> None:
        """Open the stages of every system; called when all weights are those that are tested.

        Args:
            directory: of the run.

        Raises:
            ValueError: a listener needs sound, and there is no vocoder; or the voices of the test set cannot be used.
        """
        module, settings = self.module, self.settings
        listeners = self._listeners()
        if listeners.need_audio and module.vocoder is None:
            needing = [one for one in (module.judge, *settings.listeners) if one is not None and one.needs_audio]
            raise ValueError(f"{type(needing[0]).__name__} hears sound: the recipe must set model.vocoder")
        if self.suite.has_voices:
            self._take_voices(directory / "test" / VOICES)
        vocoder, voices = self._vocoder, self.voices_digest(self._stages.requests)
        folder = directory / "test" / STAGES
        self._stages.begin(folder, listeners, vocoder, voices, settings.max_failed_share)

    @property
    def _vocoder(self) -> Any:
        """The vocoder, if anything is to be heard."""
        wanted = self._listeners().need_audio or self.settings.audio == "all"
        return self.module.vocoder if wanted else None

    def _listeners(self) -> Listeners:
        prompts = {name: item.prompt_audio for name, item in self.items.items() if item.prompt_audio is not None}
        return Listeners(self.module.judge, self.settings.readings, self.settings.measures, prompts)

    def _take_voices(self, path: Path) -> None:
        """Let everything that speaks do so in the voices of the test set."""
        self.suite.write_voices(path)
        speaking = (self.module.policy, self.reference, self.module.vocoder)
        for model in (one for one in speaking if one is not None):
            model.use_voices(path)

    def voices_digest(self, requests: Sequence[UtteranceRequest]) -> str:
        """Changes with what the policy reads of voices and texts: its ids, or the recordings of a test set.

        Args:
            requests: what is spoken.
        """
        if not self.suite.has_voices:
            return digest(encode(self.module.policy, requests))
        files = {item.prompt_audio for item in self.items.values() if item.prompt_audio is not None}
        return digest(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))

    def step(self, batch: Sequence[UtteranceRequest]) -> None:
        """Take one batch through all stages, with every system."""
        self._stages.step(batch)

    def finish(self, directory: Path, first: bool = True) -> None:
        """Gather all ranks; the first writes and prints.

        Args:
            directory: of the run.
            first: whether this rank is the first.
        """
        judged, rows = self._stages.finish(first)
        if first:
            self._write(directory / "test", judged, rows)

    def _write(self, directory: Path, judged: dict[str, list[Candidate]], rows: Mapping[str, Rows]) -> None:
        audio = self._audio(directory / "audio", judged)
        listeners = self._listeners()
        utterances = []
        for system, candidates in judged.items():
            warn_of_failures(candidates)
            for one in candidates:
                item = self.items[one.prompt.id]
                columns = {
                    "id": self._public_id(one),
                    "audio": audio.get((system, one.id), ""),
                    "stop_reason": "end_of_speech" if one.finished else "length_limit",
                    "prompt_audio": "" if item.prompt_audio is None else str(item.prompt_audio),
                }
                utterances.append(
                    judged_utterance(one, system, rows[system], listeners, self.protocol, item.reference, **columns)
                )
        summary = write_report(directory, utterances, self._facts(directory.parent))
        print()  # the progress bar has left the line open
        print_table(summary)

    def _public_id(self, candidate: Candidate) -> str:
        """Name of an utterance in the report: in a published test set that of its recording."""
        if self.suite.name == "sentences":
            return candidate.id
        return candidate.prompt.id if self.settings.samples == 1 else f"{candidate.prompt.id}-{candidate.sample}"

    def _facts(self, run: Path) -> dict[str, Any]:
        """What the numbers were made with, and the accuracy of the judge itself if it was measured in this run."""
        module, settings = self.module, self.settings
        assert module.judge is not None
        models: dict[str, Any] = {"judge": module.judge.identity()}
        if settings.readings is not None:
            models["readings"] = settings.readings.identity()
        models |= {system: {"digest": weights} for system, weights in self._stages.digests.items()}
        if module.vocoder is not None:
            models["vocoder"] = {"digest": module.vocoder.digest()}
        suite = {"name": self.suite.name, "path": self.suite.path, "sentences": len(self.suite.items)}
        suite["digest"] = self.suite.digest()
        protocol = {} if self.protocol is None else {"protocol": self.protocol.identity()}
        known = calibration_of(run / CALIBRATION, settings.readings or module.judge)
        accuracy = {} if known is None else {"judge_accuracy": known.summary()}
        return {"suite": suite, **protocol, **accuracy, "models": models | describe(settings.measures)}

    def _audio(self, folder: Path, judged: dict[str, list[Candidate]]) -> dict[tuple[str, str], str]:
        """Keep the sound of some sentences before and after; where the reading changed first."""
        chosen = self._chosen(judged) if self.module.vocoder is not None and self.settings.audio else []
        kept: dict[tuple[str, str], str] = {}
        for start in range(0, len(chosen), self.settings.batch_rows):
            part = chosen[start : start + self.settings.batch_rows]
            said = [(system, one) for pair in part for system, one in pair.items() if one.speech]
            sounds = waveforms_of(self.module.vocoder, [one for _, one in said]) if said else []  # type: ignore[arg-type]
            waveforms: dict[str, dict[str, Any]] = {}
            for (system, one), sound in zip(said, sounds, strict=True):
                waveforms.setdefault(one.id, {})[system] = sound.numpy()
            names = {one.id: self._public_id(one) for _, one in said}
            for name, pair in waveforms.items():
                rate = self.module.vocoder.sample_rate  # type: ignore[union-attr]
                for system, path in write_pair(folder, names[name], pair, rate).items():
                    kept[system, name] = str(path.relative_to(folder.parent))
        keep_only(folder, {Path(path).name for path in kept.values()}, SYSTEMS)
        return kept

    def _chosen(self, judged: dict[str, list[Candidate]]) -> list[dict[str, Candidate]]:
        """Utterances whose sound is kept, of every system."""
        known: dict[str, dict[str, Candidate]] = {}
        for system, candidates in judged.items():
            for one in candidates:
                known.setdefault(one.id, {})[system] = one
        pairs = [pair for pair in known.values() if len(pair) == len(judged)]
        if self.settings.audio == "all":
            return pairs
        heard = [pair for pair in pairs if all(one.speech for one in pair.values())]
        heard.sort(key=lambda pair: (len({_reading(one) for one in pair.values()}) == 1, next(iter(pair.values())).id))
        return heard[: self.settings.audio]


def _reading(candidate: Candidate) -> str:
    return "" if candidate.verdict is None else str(candidate.verdict.reading)


def _as_it_is(batch: Sequence[UtteranceRequest]) -> Sequence[UtteranceRequest]:
    return batch
