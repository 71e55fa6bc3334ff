# SPDX-License-Identifier: Apache-2.0
"""What the framework expects of models, whoever makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tts_align.batch import Rows, Scored
from tts_align.models.layout import Layout


@dataclass(frozen=True)
class Prompt:
    """What to say.

    Args:
        text: text token ids, the prefix (voice, instruction) included.
        seed: of this utterance alone, so that its speech does not depend on its neighbours.
        prefix: how many leading text tokens are prefix; they do not count for the length limits.
        speech: codes of a recording to continue, may be empty.
    """

    text: tuple[int, ...]
    seed: int
    prefix: int = 0
    speech: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spoken:
    """What came out.

    Args:
        speech: codes, on the CPU, without end-of-speech.
        finished: whether end-of-speech was sampled; ``False`` when the length limit cut the utterance.
    """

    speech: Int[Tensor, " s"]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How speech tokens are drawn.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus: most probable tokens are kept until their share exceeds this.
        top_k: at most so many tokens are kept; 0 for no limit.
        repetition_window: repetition-aware sampling looks back so many tokens; 0 turns it off.
        repetition_share: a token that fills at least this share of the window is drawn again from the whole
            distribution, itself excluded.
        min_ratio: no end-of-speech before so many speech tokens per text token.
        max_ratio: the utterance is cut after so many speech tokens per text token.
    """

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 25
    repetition_window: int = 10
    repetition_share: float = 0.1
    min_ratio: float = 2.0
    max_ratio: float = 20.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, or would have no effect."""
        faults = []
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.temperature < 0 or self.top_k < 0 or self.repetition_window < 0:
            faults.append("temperature, top_k and repetition_window must not be negative")
        if not 0 <= self.min_ratio < self.max_ratio:
            faults.append(f"expected 0 <= min_ratio < max_ratio, got {self.min_ratio} and {self.max_ratio}")
        if self.repetition_window and not 0 < self.repetition_share <= 1:
            faults.append(f"repetition_share must lie in (0, 1], got {self.repetition_share}; 0 for the window is off")
        if faults:
            raise ValueError("; ".join(faults))


class CodecLM(nn.Module, ABC):
    """A language model over speech tokens, given text.

    A final class is built from a directory and can be built again from it: the reference is never a copy of the policy.
    """

    layout: Layout
    """Special ids and block sizes of its sequences."""
    packed: bool
    """Whether rows should be collated several to a bin."""

    @abstractmethod
    def forward(self, rows: Rows, logits: bool = False) -> Scored:
        """Score every target of ``rows``.

        Args:
            rows: arranged rows on the model's device.
            logits: keep the distributions, (m, v).
        """

    @abstractmethod
    def encode_text(self, text: str, speaker: str = "") -> tuple[tuple[int, ...], int]:
        """Token ids of ``text`` in a voice, and how many of the leading ones are prefix."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> list[Spoken]:
        """Speak all prompts in one batch.

        Args:
            prompts: what to say; each utterance depends on its own prompt and seed only.
            sampling: how tokens are drawn.
            progress: called with the number of utterances that have ended since the last call.
        """

    @abstractmethod
    def rebuild(self) -> CodecLM:
        """The model as its directory holds it, without adapters: a fresh reference."""

    @abstractmethod
    def without_adapter(self) -> AbstractContextManager[None]:
        """Within the block the model is its frozen base; raises ``RuntimeError`` when other weights train."""

    @property
    @abstractmethod
    def adapted(self) -> bool:
        """Whether only adapters train, so that the base inside is the reference."""

    @contextmanager
    def wearing(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the trained weights are these: other adapters on the one base, or another whole model.

        Args:
            weights: one tensor for each parameter that trains, by name.

        Raises:
            ValueError: some are missing.
        """
        trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
        if lacking := sorted(trained.keys() - weights.keys()):
            raise ValueError(f"the weights lack {len(lacking)} of {len(trained)} that train, {lacking[0]} first")
        own = {name: value.detach().clone() for name, value in trained.items()}
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(own[name])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write a directory from which the model can be built, adapters merged; atomically."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of all weights as they are now: the part of a cache's key that training changes."""


class Vocoder(nn.Module, ABC):
    """Turns speech tokens into sound."""

    sample_rate: int
    """Of the waveforms, in Hz."""

    @abstractmethod
    def speak(self, speech: Sequence[Int[Tensor, " s"]], speakers: Sequence[str]) -> list[Float[Tensor, " time"]]:
        """Waveforms in [-1, 1], on the CPU, one for each utterance."""


class SpeechTokenizer(nn.Module, ABC):
    """Turns sound into speech tokens."""

    codes: int
    """Size of the codebook."""
    sample_rate: int
    """Of the waveforms it hears, in Hz."""

    @abstractmethod
    def encode(self, waveforms: Sequence[Float[Tensor, " time"]]) -> list[Int[Tensor, " s"]]:
        """Codes of each waveform, on the CPU; a waveform's codes do not depend on its neighbours."""
