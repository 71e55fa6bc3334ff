# SPDX-License-Identifier: Apache-2.0
"""What a judge is given and what it answers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tts_align.models.base.device import OwnsItsDevice
from tts_align.utils.shards import digest


class Reading(StrEnum):
    """Which reading of the marked word was heard."""

    RIGHT = "right"
    WRONG = "wrong"
    NEITHER = "neither"
    UNMARKED = "unmarked"
    """The sentence marks no word."""


@dataclass(frozen=True)
class Expected:
    """What should have been said.

    Args:
        text: the sentence as written.
        transcripts: reading of the marked word -> transcript of the whole sentence in the judge's script; a sentence
            without a marked word has one entry, under the empty reading.
        right: the readings that are right here.
    """

    text: str
    transcripts: Mapping[str, str] = field(default_factory=dict)
    right: tuple[str, ...] = ()


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
    """

    transcript: str
    reading: Reading
    cer: float
    nearest_cer: float
    margin: float = float("nan")
    target_share: tuple[float, float] | None = None


class Judge(OwnsItsDevice, ABC):
    """Listens to utterances and compares them with what should have been said.

    Verdicts are kept with the :meth:`identity` of their judge, and are made anew by another one. Its class, constructor
    arguments and registered weights are part of it by themselves; a judge whose code changes says so with ``version``.

    :meth:`judge` of a subclass runs on the judge's own device, in full precision and without gradients; see
    :mod:`tts_align.models.base.device`.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("judge",)
    needs_audio: ClassVar[bool] = True
    """Whether it needs waveforms; ``False`` for a judge that reads speech tokens."""
    version: ClassVar[str] = "1"
    """Of the judge's code: change it when the same utterance may get another verdict than before."""
    neutral_arguments: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    """Constructor arguments that change no verdict."""
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Judge:
        """Note the constructor's arguments."""
        judge = super().__new__(cls)
        # A copy is made without arguments and takes over those of the original.
        given = inspect.signature(cls.__init__).bind_partial(judge, *args, **kwargs)
        given.apply_defaults()
        object.__setattr__(judge, "_arguments", dict(list(given.arguments.items())[1:]))
        return judge

    def identity(self) -> dict[str, str]:
        """What a verdict depends on besides the utterance: class, version, arguments and weights."""
        known = {name: value for name, value in self._arguments.items() if name not in self.neutral_arguments}
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "version": self.version,
            "arguments": digest({name: _plain(value) for name, value in sorted(known.items())}),
            "weights": digest([(name, _sum(value)) for name, value in self.state_dict().items()]),
        }

    def same_as(self, other: Judge) -> bool:
        """Whether another judge is this one, by its weights, or by all of its identity if there are none."""
        mine, others = self.identity(), other.identity()
        key = "weights" if self.state_dict() else "arguments"
        return all(mine[name] == others[name] for name in ("class", "version", key))

    @abstractmethod
    def judge(self, samples: Sequence[SpeechSample], expected: Sequence[Expected]) -> list[Verdict]:
        """One verdict per utterance; an utterance's verdict does not depend on its neighbours."""


def _plain(value: Any) -> str:
    """A constructor's argument as text that is the same in every process; of other objects their class."""
    if value is None or isinstance(value, (bool, int, float, str, PurePath)) or is_dataclass(value):
        return repr(value)
    if isinstance(value, Mapping):
        return repr({str(name): _plain(one) for name, one in value.items()})
    if isinstance(value, (list, tuple)):
        return repr([_plain(one) for one in value])
    if isinstance(value, (set, frozenset)):
        return repr(sorted(_plain(one) for one in value))
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _sum(value: Tensor) -> str:
    return digest(tuple(value.shape), value.detach().cpu().contiguous().view(-1).double().sum().item())
