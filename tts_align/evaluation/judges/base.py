# SPDX-License-Identifier: Apache-2.0
"""What a judge is given and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tts_align.data.records import Span
from tts_align.evaluation.identity import Identified
from tts_align.models.base.device import OwnsItsDevice


class Reading(StrEnum):
    """Which reading of the marked word was heard."""

    RIGHT = "right"
    WRONG = "wrong"
    NEITHER = "neither"
    UNMARKED = "unmarked"
    """The sentence marks no word."""
    ABSTAINED = "abstained"
    """The judge cannot tell."""


@dataclass(frozen=True)
class Expected:
    """What should have been said.

    Args:
        text: the sentence as written.
        transcripts: reading of the marked word -> transcript of the whole sentence in the judge's script; a sentence
            without a marked word has one entry, under the empty reading.
        right: the readings that are right here.
        spans: the marked words; the readings of the first are told apart.
        language: BCP 47 code of the sentence; empty if unknown.
    """

    text: str
    transcripts: Mapping[str, str] = field(default_factory=dict)
    right: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    language: str = ""


@dataclass(frozen=True)
class SpeechSample:
    """One utterance to judge; a judge uses the sound or the tokens.

    Args:
        speech: speech tokens.
        waveform: sound in [-1, 1], or ``None`` when the judge reads speech tokens.
        sample_rate: of the waveform in Hz, 0 without one.
        speaker: name of the voice.
    """

    speech: Int[Tensor, " s"]
    waveform: Float[Tensor, " time"] | None
    sample_rate: int
    speaker: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one utterance.

    Args:
        transcript: what it heard.
        reading: which reading of the marked word.
        cer: character error rate against the transcript with the right reading (the nearest of them, if several).
        nearest_cer: against the nearest of all readings: intelligibility apart from the reading.
        margin: log-likelihood of the best right reading minus that of the best wrong one, in nats; NaN if the judge
            gives none.
        target_share: where the marked word begins and ends, as shares of the utterance's length; ``None`` if unknown.
        readings: candidate reading -> how much the sound speaks for it, in nats; empty if the judge gives no scores.
    """

    transcript: str
    reading: Reading
    cer: float
    nearest_cer: float
    margin: float = float("nan")
    target_share: tuple[float, float] | None = None
    readings: Mapping[str, float] = field(default_factory=dict)

    @property
    def abstained(self) -> bool:
        """Whether the judge could not tell which reading was said."""
        return self.reading is Reading.ABSTAINED


class Judge(Identified, OwnsItsDevice, ABC):
    """Listens to utterances and compares them with what should have been said.

    Verdicts are kept with the :meth:`identity` of their judge, and are made anew by another one. Its class, constructor
    arguments and registered weights are part of it by themselves; a judge whose code changes says so with ``version``.

    :meth:`judge` of a subclass runs on the judge's own device, in full precision and without gradients; see
    :mod:`tts_align.models.base.device`.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("judge",)
    needs_audio: ClassVar[bool] = True
    """Whether it needs waveforms; ``False`` for a judge that reads speech tokens."""

    def same_as(self, other: Judge) -> bool:
        """Whether another judge is this one, by its weights, or by all of its identity if there are none."""
        mine, others = self.identity(), other.identity()
        key = "weights" if self.state_dict() else "arguments"
        return all(mine[name] == others[name] for name in ("class", "version", key))

    @abstractmethod
    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        """One verdict per utterance; an utterance's verdict does not depend on its neighbours."""
