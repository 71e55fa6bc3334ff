# SPDX-License-Identifier: Apache-2.0
"""What a guard hears of a policy at one step, and whether it is worse than what it heard at first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torchaudio

from tts_align.evaluation.candidates import Candidate
from tts_align.evaluation.judges.base import Judge
from tts_align.evaluation.speaking import waveforms_of
from tts_align.evaluation.statistics.intervals import Difference, paired_difference
from tts_align.models.base.vocoder import Vocoder
from tts_align.training.callbacks.watched import Watched


@runtime_checkable
class SpeakerVectors(Protocol):
    """What tells voices apart: a vector for each waveform."""

    sample_rate: int

    def encode(self, waveforms: Sequence[torch.Tensor]) -> torch.Tensor:
        """Vectors, one row for each waveform."""


@dataclass(frozen=True)
class Hearing:
    """What was heard of the held-out utterances at one step; the same on every rank.

    Args:
        step: optimiser steps done by then.
        cer: character error rate of each utterance that was judged, by name; 1 for one without speech.
        sentences: name of the sentence of each of them: utterances of one sentence are not independent.
        reward: mean of what the reward model says of the utterances with speech; ``None`` without a reward model.
        vectors: what tells voices apart, of each utterance with speech, by name; empty without an encoder.
        silent: utterances without speech.
        failed: utterances that vocoder or judge failed on; they are in none of the numbers.
    """

    step: int
    cer: dict[str, float]
    sentences: dict[str, str]
    reward: float | None = None
    vectors: dict[str, list[float]] = field(default_factory=dict)
    silent: int = 0
    failed: int = 0

    def to_state(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return dataclasses.asdict(self)

    @property
    def numbers(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"guard/cer": sum(self.cer.values()) / max(len(self.cer), 1), "guard/failed": float(self.failed)}
        return found if self.reward is None else found | {"guard/reward": self.reward}


def rise(first: Hearing, now: Hearing) -> Difference:
    """By how much the mean error rate is higher than at first, with a 95 % interval that resamples sentences."""
    names = sorted(first.cer.keys() & now.cer.keys())
    before, after = ([one.cer[name] for name in names] for one in (first, now))
    return paired_difference(before, after, [first.sentences[name] for name in names])


def harm(first: Hearing, now: Hearing, cer_rise: float, similarity_fall: float) -> str:
    """What is worse than at first, for sure; empty if nothing is.

    With harm to what is heard while the reward model likes it better, the reward is being hacked.

    Args:
        first: before the training.
        now: what is compared.
        cer_rise: rise of the mean error rate that is tolerated, however sure it is.
        similarity_fall: tolerated fall of the mean similarity of the voices.
    """
    if now.silent and now.silent >= len(now.cer):
        return "harm: the policy has fallen silent: not one utterance holds any speech"
    worse = rise(first, now)
    if not worse.n:
        return f"harm: nothing to compare: no utterance was judged both at step {first.step} and at step {now.step}"
    if worse.value > cer_rise and worse.low > 0:
        up = f"error rate is up by {worse.value:.3f} ({worse.low:.3f} to {worse.high:.3f}) since step {first.step}"
        if first.reward is None or now.reward is None:
            return f"harm: the listener's {up}"
        if now.reward > first.reward:
            gain = f"its reward rose from {first.reward:.3g} to {now.reward:.3g}"
            return f"hacking: the reward model is being fooled: {gain}, but the listener's {up}"
        return f"harm: the listener's {up}, and the reward model does not like it better either"
    if now.vectors and (fall := 1 - similarity(now.vectors, first.vectors)) > similarity_fall:
        return f"harm: the voice has moved: its similarity to the start fell by {fall:.3f}"
    return ""


def similarity(vectors: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> float:
    """Mean cosine of the same utterances' vectors.

    >>> similarity({"a": [1.0, 0.0]}, {"a": [2.0, 0.0]})
    1.0
    """
    names = sorted(vectors.keys() & first.keys())
    if not names:
        return 0.0
    one, other = (torch.tensor([side[name] for name in names]) for side in (vectors, first))
    return float(torch.nn.functional.cosine_similarity(one, other).mean())


def voice_vectors(encoder: SpeakerVectors, vocoder: Vocoder, spoken: Sequence[Candidate]) -> dict[str, list[float]]:
    """What tells voices apart, of each utterance, by name.

    Args:
        encoder: hears the voices.
        vocoder: speaks.
        spoken: utterances with speech.
    """
    sounds = waveforms_of(vocoder, spoken)
    if vocoder.sample_rate != encoder.sample_rate:
        change = torchaudio.transforms.Resample(vocoder.sample_rate, encoder.sample_rate)
        sounds = [change(sound) for sound in sounds]
    return {one.id: vector for one, vector in zip(spoken, encoder.encode(sounds).tolist(), strict=True)}


def prepare_listener(module: Watched, judge: Judge | None, use_test_judge: bool, name: str, role: str = "") -> None:
    """Put a callback's listener on the module's device, and refuse one that may not listen.

    Args:
        module: whose policy is heard.
        judge: listener of the callback; ``None`` for that of ``test``.
        use_test_judge: whether the judge of ``test`` may listen.
        name: class of the callback.
        role: what messages call it; the name by default.

    Raises:
        ValueError: there is no listener, or it is the judge of ``test``.
    """
    tests, role = module.judge, role or name
    if judge is None and (tests is None or not use_test_judge):
        raise ValueError(
            f"{role} has no listener: give trainer.callbacks' {name} a judge of its own (init_args.judge)"
            + ("" if tests is None else ", or let model.judge both choose and test with use_test_judge: true")
        )
    if judge is None:
        return
    judge.to(module.device).requires_grad_(False).eval()
    if tests is not None and judge.same_as(tests):
        raise ValueError(
            f"{role}'s judge is the same as model.judge, which tests: give {role} another one, or say "
            "use_test_judge: true instead"
        )
