# SPDX-License-Identifier: Apache-2.0
"""Listening to candidates: verdicts, and what is to be done where there is none.

A fault is not a verdict. Exhausted memory, and a batch of which every candidate fails for one reason, are faults of the
machine or of the recipe, and are raised. A single candidate that cannot be judged is left without a verdict, counted
and named, and never becomes a number of the model; more of them than a stated share stop the work. Silence is no fault:
an utterance without speech tokens says nothing of what it should, and its verdict says so.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tts_align.evaluation.candidate_file import CandidateFile
from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.faults import attempt
from tts_align.evaluation.judges.base import Judge, Reading, SpeechSample, Verdict
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.evaluation.speaking import UtteranceRequest, speak, waveforms_of
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.audio import read_recording
from tts_align.utils.shards import digest

log = logging.getLogger(__name__)
MAX_FAILED_SHARE = 0.01
"""Default of the largest share of candidates that may go without a verdict."""
SILENCE = Verdict(transcript="", reading=Reading.NEITHER, cer=1.0, nearest_cer=1.0)
"""Verdict on an utterance without speech tokens: every character is missing."""
_NAMED = 5


class TooManyFailuresError(ValueError):
    """More candidates could not be judged than may."""


@dataclass
class Failures:
    """The candidates that could not be judged, out of all that one process is to judge.

    Args:
        candidates: number of candidates that are to be judged.
        max_share: largest share of them that may fail; one of several always may, unless the share is 0.
        reasons: what failed, by name of the candidate.
        split_batches: number of batches that failed although each of their candidates can be judged alone.
    """

    candidates: int
    max_share: float = MAX_FAILED_SHARE
    reasons: dict[str, str] = field(default_factory=dict)
    split_batches: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_failed_share must lie in 0..1, got {self.max_share}")

    @property
    def allowed(self) -> int:
        """Number of candidates that may fail."""
        most = max(1, int(self.max_share * self.candidates)) if self.max_share else 0
        return min(most, self.candidates - 1)

    def add(self, name: str, reason: str) -> None:
        """Note a failure.

        Raises:
            TooManyFailuresError: there are more than may be; the message names them with their reasons.
        """
        self.reasons[name] = reason
        if len(self.reasons) > self.allowed:
            raise TooManyFailuresError(
                f"{len(self.reasons)} of {self.candidates} candidates could not be judged, {self.allowed} may "
                f"(max_failed_share {self.max_share:g}):\n{_listed(self.reasons)}"
            )

    def split(self, candidates: int, error: Exception) -> None:
        """Note a batch of which every candidate could be judged alone; the 1st, 10th, 100th, ... is said.

        Args:
            candidates: in the batch.
            error: what the batch failed with.
        """
        self.split_batches += 1
        if 10 ** (len(str(self.split_batches)) - 1) == self.split_batches:
            log.warning(
                "%d %s failed as a whole although each utterance can be judged alone, which is slow; the last one, of "
                "%d utterances, with %s: %s",
                self.split_batches,
                "batch" if self.split_batches == 1 else "batches",
                candidates,
                type(error).__name__,
                error,
            )


def speak_and_judge(
    policy: CodecLM,
    parts: SpeaksAndListens,
    requests: Sequence[UtteranceRequest],
    batch_rows: int,
    judge: Judge | None = None,
    failures: Failures | None = None,
) -> list[Candidate]:
    """Speak utterances and judge them.

    Args:
        policy: what speaks.
        parts: how it samples, and what vocodes and listens.
        requests: the utterances.
        batch_rows: utterances that are spoken at a time.
        judge: listens instead of the judge of ``parts``.
        failures: see :func:`listen`.
    """
    listener = judge or parts.judge
    assert listener is not None
    spoken = [one for batch in speak(policy, parts.sampling, requests, batch_rows) for one in batch]
    return [one for batch in listen(listener, parts.vocoder, spoken, failures=failures) for one in batch]


def listen(
    judge: Judge,
    vocoder: Vocoder | None,
    candidates: Sequence[Candidate],
    batch_rows: int = 64,
    failures: Failures | None = None,
    recordings: Path | None = None,
) -> Iterator[list[Candidate]]:
    """Judge candidates batch by batch, those of like length together.

    A batch that fails is tried again one by one, only to find which candidates are at fault: these come back without a
    verdict, with their ``error``.

    Args:
        judge: who listens.
        vocoder: turns speech tokens into sound, if the judge needs audio.
        candidates: what to listen to; no verdict depends on another candidate.
        batch_rows: candidates at a time.
        failures: counts what fails, over several calls if it is given; by default 1 % of ``candidates`` may.
        recordings: folder that the paths of recordings start from; by default all sound is made by the vocoder.

    Yields:
        The candidates of one batch, judged.

    Raises:
        ValueError: the judge needs audio that no recording holds, and there is no vocoder.
        TooManyFailuresError: more candidates failed than may.
        Exception: what judge or vocoder raised, if memory is exhausted, or if every candidate of a batch fails so.
    """
    if judge.needs_audio and vocoder is None and needs_vocoder(candidates, recordings):
        raise ValueError(f"{type(judge).__name__} hears sound: the recipe must set model.vocoder")
    voice = Sounds(vocoder, recordings) if judge.needs_audio else None
    failures = Failures(len(candidates)) if failures is None else failures
    if isinstance(candidates, CandidateFile):
        lengths = candidates.lengths
    else:
        lengths = [len(candidate.speech) for candidate in candidates]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_rows):
        batch = [candidates[number] for number in order[start : start + batch_rows]]
        yield _judge_batch(judge, voice, batch, failures)


def _judge_batch(judge: Judge, voice: Sounds | None, batch: Sequence[Candidate], failures: Failures) -> list[Candidate]:
    silent = [_with(one, SILENCE) for one in batch if not one.speech]
    spoken = [one for one in batch if one.speech]
    answers = attempt(lambda some: _judged(judge, voice, some), spoken, [one.id for one in spoken], failures.split)
    found = [one for one in answers if not isinstance(one, Exception)]
    faults = [(one, answer) for one, answer in zip(spoken, answers, strict=True) if isinstance(answer, Exception)]
    return silent + found + [_failed(one, fault, failures) for one, fault in faults]


@torch.no_grad()
def _judged(judge: Judge, voice: Sounds | None, batch: Sequence[Candidate]) -> list[Candidate]:
    if not batch:
        return []
    samples = speech_samples(None, batch) if voice is None else voice.samples(batch)
    verdicts = judge.judge(samples, [candidate.prompt.expected for candidate in batch])
    return [_with(candidate, verdict) for candidate, verdict in zip(batch, verdicts, strict=True)]


def speech_samples(vocoder: Vocoder | None, candidates: Sequence[Candidate]) -> list[SpeechSample]:
    """Candidates as a judge gets them, as sound if there is a vocoder."""
    sounds = [None] * len(candidates) if vocoder is None else waveforms_of(vocoder, candidates)
    rate = 0 if vocoder is None else vocoder.sample_rate
    return [
        SpeechSample(torch.tensor(one.speech, dtype=torch.long), sound, rate, one.speaker)
        for one, sound in zip(candidates, sounds, strict=True)
    ]


@dataclass(frozen=True)
class Sounds:
    """Where the sound of candidates comes from: the recordings that were written of them, or else the vocoder.

    Args:
        vocoder: makes the sound of those without a recording; may be absent if each has one.
        recordings: folder that the paths of recordings start from; ``None`` to use none.
    """

    vocoder: Vocoder | None
    recordings: Path | None = None

    def samples(self, candidates: Sequence[Candidate]) -> list[SpeechSample]:
        """Candidates with their sound, in their order.

        Raises:
            AudioError: a recording cannot be used.
        """
        made = [one for one in candidates if self.recordings is None or not one.audio]
        found = dict(zip((one.id for one in made), speech_samples(self.vocoder, made), strict=True)) if made else {}
        return [found.get(one.id) or self._recorded(one) for one in candidates]

    def _recorded(self, candidate: Candidate) -> SpeechSample:
        assert self.recordings is not None
        sound, rate = read_recording(self.recordings / candidate.audio)
        return SpeechSample(torch.tensor(candidate.speech, dtype=torch.long), sound, rate, candidate.speaker)


def needs_vocoder(candidates: Sequence[Candidate], recordings: Path | None) -> bool:
    """Whether the sound of any candidate must be made, because it has speech tokens and no recording."""
    return any(one.speech and (recordings is None or not one.audio) for one in candidates)


def _with(candidate: Candidate, verdict: Verdict) -> Candidate:
    return dataclasses.replace(candidate, verdict=verdict, error="")


def _failed(candidate: Candidate, error: Exception, failures: Failures) -> Candidate:
    reason = f"{type(error).__name__}: {error}"
    try:
        failures.add(candidate.id, reason)
    except TooManyFailuresError as stop:
        raise stop from error
    return dataclasses.replace(candidate, verdict=None, error=reason)


def warn_of_failures(candidates: Sequence[Candidate]) -> list[str]:
    """Count and name the candidates without a verdict; return their names."""
    failed = {candidate.id: candidate.error for candidate in candidates if candidate.error}
    if failed:
        log.warning("%d of %d candidates could not be judged:\n%s", len(failed), len(candidates), _listed(failed))
    return list(failed)


def _listed(reasons: dict[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_NAMED]]
    return "\n".join(lines + [f"  and {len(reasons) - _NAMED} more"] * (len(reasons) > _NAMED))


def listener_digest(module: SpeaksAndListens) -> str:
    """Digest of everything a verdict depends on: the judge's identity, and the vocoder's sound."""
    assert module.judge is not None
    # A folder of weights may have another name.
    identity = {name: value for name, value in module.judge.identity().items() if name != "model"}
    return digest(identity, module.vocoder.digest() if module.vocoder is not None else "")
