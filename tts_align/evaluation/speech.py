# SPDX-License-Identifier: Apache-2.0
"""What ``test`` does: speak sentences before and after training with the same seeds, judge, and show the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tts_align.data.select import LabelledUtterance
from tts_align.evaluation.audio import write_pair
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.listening import MAX_FAILED_SHARE, Failures, speak_and_judge, warn_of_failures
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.report import JudgedUtterance, System, print_table, write_report
from tts_align.evaluation.speaking import UtteranceRequest, evenly_spread, utterance_requests, waveforms_of
from tts_align.models.base.policy import CodecLM
from tts_align.objectives.tkto import TKTO, token_weights
from tts_align.training.cache import TokenCache
from tts_align.training.callbacks import figures
from tts_align.training.contrast import WEIGHTS, deciding_token, separation
from tts_align.utils.seeds import part_seed

if TYPE_CHECKING:
    from tts_align.training.module import AlignModule


@dataclass(frozen=True)
class TestSettings:
    """What ``test`` speaks.

    Args:
        prompts: JSONL file of sentences, none of which was trained on; demo: names an embedded one.
        speakers: voices; a sentence that names its own is spoken in that one only.
        samples: utterances per sentence and voice.
        sentences: test only so many, evenly spread; for trials.
        seed: of all utterances, the same before and after; by default 1 plus that of the run (seed_everything).
        batch_rows: utterances at a time; does not change them.
        audio: sentences whose sound is kept, before and after, those that changed first.
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
    """One test of one module.

    Args:
        module: its policy is the aligned system; its vocoder and judge are used.
        reference: the system before training; ``None`` for the policy without its adapter, or for none at all when
            it has no adapter.
        settings: what is spoken.
    """

    def __init__(self, module: AlignModule, reference: CodecLM | None, settings: TestSettings) -> None:
        self.module, self.reference, self.settings = module, reference, settings
        self.judged: dict[System, list[Candidate]] = {"base": [], "aligned": []}
        self._failures: dict[System, Failures] = {}

    def loader(self, rank: int, world: int) -> DataLoader[Sequence[UtteranceRequest]]:
        """This rank's utterances in batches of sentences of like length."""
        settings = self.settings
        prompts = evenly_spread(read_prompts(settings.prompts), settings.sentences)
        items = utterance_requests(prompts, settings.speakers, settings.samples, part_seed(settings.seed, 1))
        mine = sorted(items[rank::world], key=lambda item: len(item.prompt.text))
        self._failures = {system: Failures(len(mine), settings.max_failed_share) for system in self.judged}
        batches = [mine[i : i + settings.batch_rows] for i in range(0, len(mine), settings.batch_rows)]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

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

    def finish(self, directory: Path) -> None:
        """Gather all ranks; the first writes and prints.

        Args:
            directory: of the run.
        """
        everything: list[dict[System, list[Candidate]]] = [self.judged]
        if self.module.trainer.world_size > 1:
            everything = [{} for _ in range(self.module.trainer.world_size)]
            dist.all_gather_object(everything, self.judged)
        if self.module.trainer.is_global_zero:
            joined = {system: [one for part in everything for one in part[system]] for system in self.judged}
            self._write(directory / "test", joined)
            self._draw(directory)

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

    def _token_weights(self, run: Path) -> TokenCache | None:
        """Those the policy was trained with, also when it was trained by an earlier call."""
        if self.module.contrast_cache is None and (run / WEIGHTS).is_file():
            weights = Path(json.loads((run / WEIGHTS).read_text("utf-8"))["weights"])
            return TokenCache.read(weights, needed=()) if weights.is_file() else None
        return self.module.contrast_cache

    def _draw(self, run: Path) -> None:
        """Figures of training and of token weights, as far as there is something to draw."""
        folder, logs = run / "test", run / "tensorboard"
        if any(logs.glob("events*")):
            with suppress(FileNotFoundError):  # an objective of the user's may log no likelihoods
                figures.likelihood_figure(figures.read_history(logs), folder / "likelihood.png")
        cache, datamodule = self._token_weights(run), getattr(self.module.trainer, "datamodule", None)
        if cache is None or datamodule is None:
            return
        datamodule.prepare(self.module.policy)
        sources = {key: one for key, one in datamodule.sources().items() if key in cache.numbers}
        sides = separation(cache, sources)
        rewards = [
            figures.TokenRewards(
                one.target.astype(np.float64), np.concatenate([one.target, one.elsewhere]).astype(np.float64)
            )
            for one in sides.values()
        ]
        figures.reward_figure(rewards[0], rewards[1], folder / "token_rewards.png")
        marked = [key for key, one in sources.items() if not one.desirable and deciding_token(one, 2) is not None]
        if not marked:
            return
        key = _typical(marked, cache, sources)
        source, values = sources[key], torch.from_numpy(np.array(cache.numbers[key]))
        objective = self.module.objective
        knobs = (objective.mu, objective.lower, objective.upper) if isinstance(objective, TKTO) else (1.0, -2.0, 2.0)
        weights = token_weights(values[None], torch.tensor([source.desirable]), *knobs)[0]
        count, scores = len(weights) - 1, source.row.scores
        place = (scores["target_start"] * count, scores["target_end"] * count)
        figures.weight_figure(
            weights.numpy(),
            _spread(source, place, count),
            folder / "token_weights.png",
            target=place,
            desirable=source.desirable,
        )


def _typical(keys: Sequence[str], cache: TokenCache, sources: Mapping[str, LabelledUtterance]) -> str:
    """The row whose deciding token has the median reward: neither the best nor the worst example."""

    def reward(key: str) -> tuple[float, str]:
        values = cache.numbers[key]
        return float(values[deciding_token(sources[key], len(values)) or 0]), key

    return sorted(keys, key=reward)[len(keys) // 2]


def _spread(source: LabelledUtterance, place: tuple[float, float], count: int) -> list[tuple[str, float, float]]:
    """What was heard, kana by kana, with the marked word at its place and the rest spread evenly around it."""
    transcript, span = source.row.notes.get("transcript", ""), source.row.spans[0]
    word = next((reading for reading in (*span.wrong, *span.right) if reading in transcript), "")
    first = transcript.find(word) if word else len(transcript)
    pieces = (
        (transcript[:first], 0.0, place[0] if word else float(count)),
        (word, *place),
        (transcript[first + len(word) :], place[1], float(count)),
    )
    return [
        (kana, start + (end - start) * i / len(text), start + (end - start) * (i + 1) / len(text))
        for text, start, end in pieces
        for i, kana in enumerate(text)
    ]


def _reading(candidate: Candidate) -> str:
    return "" if candidate.verdict is None else str(candidate.verdict.reading)


def _as_it_is(batch: Sequence[UtteranceRequest]) -> Sequence[UtteranceRequest]:
    return batch
