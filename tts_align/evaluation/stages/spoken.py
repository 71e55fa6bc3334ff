# SPDX-License-Identifier: Apache-2.0
"""The stages of utterances that policies speak: synthesise, and all that listens, before and after the training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.speaking import UtteranceRequest, speak
from tts_align.evaluation.stages.hearing import Hearing, Listeners
from tts_align.evaluation.stages.scoring import Rows, with_verdict
from tts_align.evaluation.stages.sound import Spoken
from tts_align.evaluation.stages.store import Row, StageStore
from tts_align.evaluation.utterances import SYSTEMS
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.shards import digest


class SpokenStages:
    """Utterances of every system on their way through the stages, each of which resumes by itself.

    Args:
        module: its policy is the aligned system.
        reference: the system before training; ``None`` for the policy without its adapter, or for none at all when it
            has no adapter.
        requests: all utterances of all processes.
        mine: those of this process.
        rank: number of this process.
    """

    def __init__(
        self,
        module: SpeaksAndListens,
        reference: CodecLM | None,
        requests: Sequence[UtteranceRequest],
        mine: Sequence[UtteranceRequest],
        rank: int = 0,
    ) -> None:
        self.module, self.reference = module, reference
        self.requests, self.mine, self.rank = list(requests), list(mine), rank
        self.digests: dict[str, str] = {}
        self.hearing: dict[str, Hearing] = {}
        self._spoken: dict[str, StageStore] = {}
        self._vocoder: Vocoder | None = None

    @property
    def systems(self) -> tuple[str, ...]:
        """Systems that there are: before and after, or after alone."""
        return SYSTEMS if self.reference is not None or self.module.policy.adapted else SYSTEMS[1:]

    def begin(
        self,
        folder: Path,
        listeners: Listeners,
        vocoder: Vocoder | None,
        voices: str,
        max_failed_share: float,
        part: str = "",
    ) -> None:
        """Open the stages of every system; called when all weights are those that speak.

        Where nothing was trained, before and after are one system, and spoken once.

        Args:
            folder: of all stages.
            listeners: what listens.
            vocoder: makes the sound; ``None`` if none is needed.
            voices: digest of the voices.
            max_failed_share: largest share of this process's utterances on which one of the listeners may fail.
            part: of a test; begins the names of its files.
        """
        self._vocoder = vocoder
        digests = {system: self._digest_of(system) for system in self.systems}
        self.digests = digests if len(set(digests.values())) == len(digests) else {SYSTEMS[0]: digests[SYSTEMS[0]]}
        sound = vocoder.digest() if vocoder is not None else ""
        ids, mine = [one.id for one in self.requests], [one.id for one in self.mine]
        for system, weights in self.digests.items():
            name = f"{part}{system}"
            key = digest("synthesise", weights, self.module.sampling, self.requests, voices)
            self._spoken[system] = StageStore(folder, f"synthesise-{name}", key, ids, mine, self.rank)
            made = digest(key, sound)
            self.hearing[system] = Hearing(listeners, folder, name, made, ids, mine, self.rank, max_failed_share)

    def _digest_of(self, system: str) -> str:
        if system == "base" and self.reference is not None:
            return self.reference.speech_digest()
        with self._as(system):
            return self.module.policy.speech_digest()

    def _as(self, system: str) -> AbstractContextManager[Any]:
        """Within it the policy is a system, if the reference is not."""
        alone = system == "base" and self.reference is None
        return self.module.policy.without_adapter() if alone else nullcontext()

    def step(self, batch: Sequence[UtteranceRequest]) -> None:
        """Take one batch through all stages, with every system."""
        for system in self.digests:
            model = self.reference if system == "base" and self.reference is not None else self.module.policy
            with self._as(system):
                self._speak(system, model, batch)
            candidates = [Candidate.from_row(self._spoken[system].get(one.id) or {}) for one in batch]
            self.hearing[system].listen(candidates, Spoken(self._vocoder))

    def _speak(self, system: str, model: CodecLM, batch: Sequence[UtteranceRequest]) -> None:
        store = self._spoken[system]
        wanted = set(store.wanted([one.id for one in batch]))
        if new := [one for one in batch if one.id in wanted]:
            spoken = [one for some in speak(model, self.module.sampling, new, len(new)) for one in some]
            store.add(one.to_row() for one in spoken)

    def finish(self, first: bool) -> tuple[dict[str, list[Candidate]], dict[str, Rows]]:
        """What all processes have spoken and heard; all must call it, and the first writes the stages' files.

        Args:
            first: whether this process is the first.

        Returns:
            The utterances of each system with their verdicts, and the rows of its listening stages.
        """
        spoken: dict[str, dict[str, Row]] = {system: store.finish(first) for system, store in self._spoken.items()}
        rows: dict[str, Rows] = {
            system: {name: store.finish(first) for name, store in hearing.stores.items()}
            for system, hearing in self.hearing.items()
        }
        judged = {
            system: [
                with_verdict(Candidate.from_row(found[one.id]), rows[system])
                for one in self.requests
                if one.id in found
            ]
            for system, found in spoken.items()
        }
        return judged, rows
