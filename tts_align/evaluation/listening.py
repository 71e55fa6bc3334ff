# SPDX-License-Identifier: Apache-2.0
"""Listen to candidates and write down what was heard."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge, SpeechSample, Verdict
from tts_align.evaluation.parts import SpeaksAndListens
from tts_align.models.base.vocoder import Vocoder
from tts_align.utils.shards import digest

log = logging.getLogger(__name__)
_NAMED = 5


@torch.no_grad()
def hear(vocoder: Vocoder | None, candidates: Sequence[Candidate]) -> list[SpeechSample]:
    """Candidates as a judge gets them, as sound if there is a vocoder."""
    speech = [torch.tensor(candidate.speech, dtype=torch.long) for candidate in candidates]
    speakers = [candidate.speaker for candidate in candidates]
    if vocoder is None:
        return [
            SpeechSample(speech_tokens, None, 0, speaker)
            for speech_tokens, speaker in zip(speech, speakers, strict=True)
        ]
    waveforms = vocoder.speak(speech, speakers)
    return [
        SpeechSample(speech_tokens, waveform, vocoder.sample_rate, speaker)
        for speech_tokens, waveform, speaker in zip(speech, waveforms, speakers, strict=True)
    ]


def listen(
    judge: Judge, vocoder: Vocoder | None, candidates: Sequence[Candidate], batch_rows: int = 64
) -> Iterator[list[Candidate]]:
    """Judge candidates batch by batch, those of like length together.

    A batch that fails is tried again one by one, so that only the candidates at fault go without a verdict; they come
    back with their ``error``.

    Args:
        judge: who listens.
        vocoder: turns speech tokens into sound, if the judge hears sound.
        candidates: what to listen to; no verdict depends on another candidate.
        batch_rows: candidates at a time.

    Yields:
        The candidates of one batch, judged.
    """
    if judge.needs_audio and vocoder is None:
        raise ValueError(f"{type(judge).__name__} hears sound: the recipe must set model.vocoder")
    voice = vocoder if judge.needs_audio else None
    order = sorted(candidates, key=lambda candidate: len(candidate.speech))
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        try:
            yield _judged(judge, voice, batch)
        except Exception:
            yield [_judged_alone(judge, voice, candidate) for candidate in batch]


@torch.no_grad()
def _judged(judge: Judge, vocoder: Vocoder | None, batch: Sequence[Candidate]) -> list[Candidate]:
    if silent := [candidate.id for candidate in batch if not candidate.speech]:
        raise ValueError(f"{silent[0]} has no speech")
    verdicts = judge.judge(hear(vocoder, batch), [candidate.prompt.expected for candidate in batch])
    return [_with(candidate, verdict) for candidate, verdict in zip(batch, verdicts, strict=True)]


def _judged_alone(judge: Judge, vocoder: Vocoder | None, candidate: Candidate) -> Candidate:
    try:
        return _judged(judge, vocoder, [candidate])[0]
    except Exception as error:
        return dataclasses.replace(candidate, verdict=None, error=f"{type(error).__name__}: {error}")


def _with(candidate: Candidate, verdict: Verdict) -> Candidate:
    return dataclasses.replace(candidate, verdict=verdict, error="")


def warn_of_failures(candidates: Sequence[Candidate]) -> list[str]:
    """Count and name the candidates without a verdict; return their names."""
    failed = [candidate for candidate in candidates if candidate.error]
    if failed:
        named = "\n".join(f"  {candidate.id}: {candidate.error}" for candidate in failed[:_NAMED])
        log.warning("%d of %d candidates could not be judged:\n%s", len(failed), len(candidates), named)
    return [candidate.id for candidate in failed]


def listener_digest(module: SpeaksAndListens) -> str:
    """Digest of the judge's weights, and of the vocoder's sound."""
    assert module.judge is not None
    judge = [(name, _sum(value)) for name, value in module.judge.state_dict().items()]
    return digest(judge, module.vocoder.digest() if module.vocoder is not None else "")


def _sum(value: torch.Tensor) -> str:
    return digest(tuple(value.shape), value.detach().cpu().contiguous().view(-1).double().sum().item())
