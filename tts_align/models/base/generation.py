# SPDX-License-Identifier: Apache-2.0
"""What a language model is asked to say, how tokens are drawn, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int
from torch import Tensor

from tts_align.models.base.layout import TokenRow


@dataclass(frozen=True)
class Context:
    """What an utterance is spoken with besides its own words.

    Args:
        speaker: name of a voice.
        instruct: how to speak, in words.
        prompt_text: transcript of a recording that the utterance continues.
        prompt_speech: speech tokens of that recording.
    """

    speaker: str = ""
    instruct: str = ""
    prompt_text: str = ""
    prompt_speech: tuple[int, ...] = ()

    @property
    def only_speaker(self) -> bool:
        """Whether nothing but the name of a voice is set."""
        return not (self.instruct or self.prompt_text or self.prompt_speech)


@dataclass(frozen=True)
class Encoded:
    """A text and its context as a language model reads them.

    Args:
        text: token ids, the prefix included.
        prefix: how many leading ones (voice, instruction, transcript of the prompt) are not the text's own.
        prompt_speech: speech tokens of the recording to continue.
    """

    text: tuple[int, ...]
    prefix: int = 0
    prompt_speech: tuple[int, ...] = ()

    def row(self, speech: Sequence[int]) -> TokenRow:
        """The row of an utterance of this text."""
        return TokenRow(self.text, tuple(speech), self.prefix, prompt=self.prompt_speech)

    def prompt(self, seed: int) -> Prompt:
        """The prompt for an utterance of this text."""
        return Prompt(self.text, seed, self.prefix, self.prompt_speech)


@dataclass(frozen=True)
class Prompt:
    """What to say.

    Args:
        text: text token ids, the prefix (voice, instruction) included.
        seed: of this utterance alone, so that its speech does not depend on its neighbours.
        prefix: how many leading text tokens are prefix; they do not count for the length limits.
        speech: speech tokens of a recording to continue, may be empty.
    """

    text: tuple[int, ...]
    seed: int
    prefix: int = 0
    speech: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spoken:
    """What came out.

    Args:
        speech: speech tokens, on the CPU, without end-of-speech.
        finished: whether end-of-speech was sampled; ``False`` when the length limit cut the utterance.
    """

    speech: Int[Tensor, " s"]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How speech tokens are drawn.

    Args:
        temperature: divisor of the logits; 0 takes the most probable token.
        top_p: share of the nucleus: the most probable tokens are kept until their share exceeds this.
        top_k: number of most probable tokens that are kept; 0 for no limit.
        repetition_window: speech tokens that repetition-aware sampling looks back over; 0 turns it off.
        repetition_share: share of the window from which on a token is drawn again from the whole distribution, itself
            excluded.
        min_ratio: fewest speech tokens per text token: no end-of-speech comes earlier.
        max_ratio: most speech tokens per text token: the utterance is cut there.
        weights: number format of the weights while speaking: own (as they are stored), bfloat16, or int8 (on a CPU).
            The coarser ones are faster and change some tokens: benchmarks/README.md says how many.
        cuda_graphs: whether to replay the kernels of a token as one CUDA graph, which takes a GPU; experimental: it has
            not been run on one yet.
    """

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 25
    repetition_window: int = 10
    repetition_share: float = 0.1
    min_ratio: float = 2.0
    max_ratio: float = 20.0
    weights: Literal["own", "bfloat16", "int8"] = "own"
    cuda_graphs: bool = False

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
