# SPDX-License-Identifier: Apache-2.0
"""A vocoder: turns speech tokens into sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from tts_align.models.base.device import OwnsItsDevice
from tts_align.models.base.flow import FlowHead
from tts_align.models.base.policy import CodecLM
from tts_align.models.base.tokenizer import TokenizerHead
from tts_align.utils.weights import weights_digest


class Vocoder(OwnsItsDevice, ABC):
    """Turns speech tokens into sound.

    :meth:`speak` of a subclass runs on the vocoder's own device, in full precision and without gradients; see
    :mod:`tts_align.models.base.device`.
    """

    on_own_device: ClassVar[tuple[str, ...]] = ("speak",)
    sample_rate: int
    """Of the waveforms, in Hz."""

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices it can speak in; ``None`` when it does not know them, or a name is just a name."""
        return None

    def bind(self, policy: CodecLM) -> None:
        """Take over what the recipe leaves out from the policy whose speech tokens are to be heard; called once."""

    def attach(self, flow: FlowHead, tokenizer: TokenizerHead, voices: Sequence[str]) -> None:
        """Take note of the models that an objective trains, should the sound be theirs; called once if there are any.

        Args:
            flow: makes mel frames of speech tokens.
            tokenizer: made the speech tokens.
            voices: names that the flow knows, in the order of its speaker vectors' numbers.
        """

    def digest(self) -> str:
        """Digest of what decides its sound: the part of a judge's key that the vocoder changes."""
        return weights_digest(self.state_dict())

    def features(
        self, tokenizer: TokenizerHead, speech: Sequence[Int[Tensor, " _"]], speakers: Sequence[str]
    ) -> list[Float[Tensor, "_ m"]] | None:
        """What a tokenizer would read of the sound, before it becomes sound; ``None`` where that is another kind.

        Args:
            tokenizer: whose features are wanted.
            speech: speech tokens of each utterance.
            speakers: name of each one's speaker.
        """
        return None

    def use_voices(self, path: Path) -> None:
        """Speak from now on in the voices of a file of recordings, which a test set brings; see ``CodecLM``.

        Args:
            path: JSONL file of voices: speaker, audio, text.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"{type(self).__name__} cannot speak in the voices of recordings, which {path} lists")

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for voices it cannot speak in; asked before anything is spoken."""

    @abstractmethod
    def speak(self, speech: Sequence[Int[Tensor, " s"]], speakers: Sequence[str]) -> list[Float[Tensor, " time"]]:
        """Waveforms in [-1, 1], on the CPU, one for each utterance."""
