# SPDX-License-Identifier: Apache-2.0
"""What a measure is given and what it answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tts_align.evaluation.identity import Identified
from tts_align.models.base.device import OwnsItsDevice
from tts_align.utils.audio import resample


class Sound(NamedTuple):
    """Samples of one channel and their rate.

    Args:
        waveform: in [-1, 1].
        sample_rate: in Hz.
    """

    waveform: Float[Tensor, " time"]
    sample_rate: int

    def at(self, sample_rate: int) -> Float[Tensor, " new_time"]:
        """The samples at another rate, on the CPU in float32."""
        waveform = self.waveform.detach().float().cpu()
        return waveform if self.sample_rate == sample_rate else resample(waveform, self.sample_rate, sample_rate)


@dataclass(frozen=True)
class MeasuredSample:
    """One utterance to measure.

    Args:
        waveform: sound in [-1, 1] of the generated part alone, or ``None`` where only speech tokens are known.
        sample_rate: of the waveform in Hz, 0 without one.
        text: what was to be said, as written.
        speech: speech tokens; empty if unknown.
        finished: whether the utterance came to an end by itself; ``None`` if unknown.
        prompt: recording of the voice that was asked for, or ``None``.
        transcript: what the judge heard; empty if nobody listened.
        language: BCP 47 code; empty if unknown.
    """

    waveform: Float[Tensor, " time"] | None
    sample_rate: int
    text: str
    speech: Int[Tensor, " s"]
    finished: bool | None
    prompt: Sound | None = None
    transcript: str = ""
    language: str = ""

    @property
    def sound(self) -> Sound:
        """The waveform with its rate; measures with ``needs_audio`` are asked only where there is one."""
        if self.waveform is None:
            raise ValueError("expected an utterance with sound: the recipe must set model.vocoder")
        return Sound(self.waveform, self.sample_rate)


class UtteranceMeasure(Identified, OwnsItsDevice, ABC):
    """Measures utterances one by one: similarity of the voice, quality, prosody.

    Numbers are kept with the :meth:`identity` of their measure. :meth:`measure` of a subclass runs on the measure's own
    device, in full precision and without gradients; see :mod:`tts_align.models.base.device`.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("measure",)
    name: ClassVar[str]
    """Of the measure; its numbers have this name, or begin with it."""
    higher_is_better: ClassVar[bool | None] = None
    """Whether more of its numbers is better; ``None`` where neither more nor less is."""
    needs_audio: ClassVar[bool] = True
    """Whether it needs waveforms; ``False`` for a measure of speech tokens, transcripts or stops."""
    needs_prompt: ClassVar[bool] = False
    """Whether it compares with a recording of the voice; an utterance without one has no number."""
    neutral_arguments: ClassVar[frozenset[str]] = frozenset({"batch_size", "model"})
    """Constructor arguments that change no number; a model counts by the digest of its weights, wherever it lies."""

    def model_files(self) -> Iterable[Path]:
        """Files whose content decides the numbers and is not among the registered weights, such as ONNX graphs."""
        return ()

    def identity(self) -> dict[str, str]:
        """What a number depends on besides the utterance; ``model`` and ``digest`` stand beside it in the summary."""
        known = super().identity()
        files = [file_digest(path) for path in self.model_files()]
        model = Path(str(self._arguments["model"])).name if self._arguments.get("model") else ""
        weights = self.state_dict()
        digest = hashlib.blake2b("".join([known["weights"] if weights else "", *files]).encode(), digest_size=8)
        return known | {"model": model, "digest": digest.hexdigest() if weights or files else ""}

    @abstractmethod
    def measure(self, samples: Sequence[MeasuredSample]) -> list[dict[str, float]]:
        """Numbers by name of each utterance; a number that is not defined for it is left out.

        An utterance's numbers do not depend on its neighbours.
        """


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def describe(measures: Sequence[UtteranceMeasure]) -> dict[str, dict[str, Any]]:
    """What the summary says of each measure: its identity, and whether more is better.

    Raises:
        ValueError: two measures have one name.
    """
    names = [one.name for one in measures]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"model.test.measures names {twice[0]!r} twice: its numbers would overwrite each other")
    return {one.name: {**one.identity(), "higher_is_better": one.higher_is_better} for one in measures}


def direction(number: str, described: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether more of a number is better, by the longest name of a measure that it begins with.

    Args:
        number: name of the number, such as ``dnsmos_overall``.
        described: what :func:`describe` gave.
    """
    owners = [name for name in described if number == name or number.startswith(f"{name}_")]
    return described[max(owners, key=len)].get("higher_is_better") if owners else None
