# SPDX-License-Identifier: Apache-2.0
"""What the framework expects of models, whoever makes them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tts_align.batch import Batch, Rows, Scored
from tts_align.models.flow_records import FlowDraws, FlowLoss, FlowPrompt, FlowRates, MelFrames
from tts_align.models.layout import Layout, TokenRow
from tts_align.models.tokenizer import Tokenised
from tts_align.rewards import Regularisers, RewardLabels, RewardScores, TaskLoss


@dataclass(frozen=True)
class Context:
    """What an utterance is spoken with besides its own words.

    Args:
        speaker: name of a voice.
        instruct: how to speak, in words.
        prompt_text: transcript of a recording that the utterance continues.
        prompt_speech: codes of that recording.
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
        prompt: codes of the recording to continue.
    """

    text: tuple[int, ...]
    prefix: int = 0
    prompt: tuple[int, ...] = ()

    def row(self, speech: Sequence[int]) -> TokenRow:
        """The row of an utterance of this text."""
        return TokenRow(self.text, tuple(speech), self.prefix, prompt=self.prompt)

    def ask(self, seed: int) -> Prompt:
        """The prompt for an utterance of this text."""
        return Prompt(self.text, seed, self.prefix, self.prompt)


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


_PLAIN = Context()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest of tensors, their names, shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(weights.items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CodecLM(nn.Module, ABC):
    """A language model over speech tokens, given text.

    A final class is built from a directory and can be built again from it: the reference is never a copy of the policy.
    """

    layout: Layout
    """Special ids and block sizes of its sequences."""
    packed: bool
    """Whether rows should be collated several to a bin."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all codes: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its codes are")

    @abstractmethod
    def forward(self, rows: Rows, logits: bool = False) -> Scored:
        """Score every target of ``rows``.

        Args:
            rows: arranged rows on the model's device.
            logits: keep the distributions, (m, v).
        """

    @abstractmethod
    def encode_text(self, text: str, context: Context = _PLAIN) -> Encoded:
        """Token ids of ``text`` and of the context it is spoken in.

        Raises:
            ValueError: the model does not take such a context.
        """

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices it can be asked for; ``None`` when a name is just a name."""
        return None

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

    def roll_out(self, batch: Batch) -> Batch:
        """The texts of a batch with utterances, spoken anew by this model; see :mod:`tts_align.models.rollouts`."""
        from tts_align.models.rollouts import roll_out

        return roll_out(batch, self)

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

    def bind(self, policy: CodecLM) -> None:
        """Take over what the recipe leaves out from the policy whose codes are to be heard; called once."""

    def attach(self, flow: FlowHead, tokenizer: TokenizerHead, voices: Sequence[str]) -> None:
        """Take note of the models that an objective trains, should the sound be theirs; called once if there are any.

        Args:
            flow: makes mel frames of codes.
            tokenizer: made the codes.
            voices: names that the flow knows, in the order of its speaker vectors' numbers.
        """

    def digest(self) -> str:
        """Digest of what decides its sound: the part of a judge's key that the vocoder changes."""
        return weights_digest(self.state_dict())

    def check_speakers(self, speakers: Iterable[str]) -> None:
        """Raise ``ValueError`` for voices it cannot speak in; asked before anything is spoken."""

    @abstractmethod
    def speak(self, speech: Sequence[Int[Tensor, " s"]], speakers: Sequence[str]) -> list[Float[Tensor, " time"]]:
        """Waveforms in [-1, 1], on the CPU, one for each utterance."""


class SpeechTokenizer(nn.Module, ABC):
    """Turns sound into speech tokens."""

    codes: int
    """Size of the codebook."""
    sample_rate: int
    """Of the waveforms it hears, in Hz."""
    max_seconds: float | None = None
    """Longest waveform it takes; ``None`` for any."""

    @abstractmethod
    def encode(self, waveforms: Sequence[Float[Tensor, " time"]]) -> list[Int[Tensor, " s"]]:
        """Codes of each waveform, on the CPU; a waveform's codes do not depend on its neighbours."""


class TokenizerHead(SpeechTokenizer):
    """A speech tokenizer that trains: gradients pass its rounding, so what reads its vectors can teach it."""

    embedding_channels: int
    """Width of its vectors."""

    @abstractmethod
    def features(self, waveform: Float[Tensor, " time"]) -> Float[Tensor, "f c"]:
        """What it reads of a waveform; no frames if that is too short."""

    @abstractmethod
    def count(self, frames: int) -> int:
        """How many codes it makes of so many frames of features."""

    @abstractmethod
    def forward(self, log_mel: Float[Tensor, "b f m"], frames: Int[Tensor, " b"]) -> Tokenised:
        """Tokenise padded features, of which so many frames are real."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s c"]:
        """Vectors of codes, or mixed of those of all codes: what :meth:`forward` hands on for them."""

    def codebook(self) -> Float[Tensor, "v c"]:
        """Vectors of all codes."""
        device = next(self.parameters()).device
        return self.embed(torch.arange(self.codes, device=device)[None])[0]


class RewardHead(nn.Module, ABC):
    """Scores speech tokens, hard or soft, so that gradients reach the soft ones."""

    codes: int
    """Speech codes c it reads."""
    tasks: tuple[str, ...]
    """Names of what it scores: ``asr``, ``ctc`` and attributes of utterances."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all codes: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its codes are")

    @abstractmethod
    def encode_labels(
        self, texts: Sequence[str | None], attributes: Sequence[Mapping[str, str | int | float | Sequence[str]]]
    ) -> RewardLabels:
        """Labels of rows, on the CPU.

        Args:
            texts: transcripts; ``None`` where there is none.
            attributes: known properties of each row by name; those of which the model knows nothing are left out.
        """

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "*r"] | Float[Tensor, "*r c"]) -> Float[Tensor, "*r h"]:
        """Vectors of codes (..., h), given as ids (...) or soft one-hots (..., c); equal ones for equal codes."""

    @abstractmethod
    def score_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """As :meth:`score`, of vectors made with :meth:`embed`: a flat (m, c) need never be padded."""

    def score(
        self,
        tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        tasks: Sequence[str] | None = None,
    ) -> RewardScores:
        """Log-probability of the labels of each row given its speech; the model must be in evaluation mode.

        Args:
            tokens: codes, as ids or soft one-hots; gradients reach the latter.
            mask: which are real; padding on the right.
            labels: what is wanted, or known.
            tasks: which to score; all that have a log-probability by default.
        """
        return self.score_embedded(self.embed(tokens), mask, labels, tasks)

    @abstractmethod
    def losses(
        self,
        tokens: Int[Tensor, "r s"] | Float[Tensor, "r s c"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """Loss of every task for the model's own training, as sums and counts."""

    @abstractmethod
    def losses_embedded(
        self,
        embedded: Float[Tensor, "r s h"],
        mask: Bool[Tensor, "r s"],
        labels: RewardLabels,
        regularisers: Regularisers | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, TaskLoss]:
        """As :meth:`losses`, of vectors in the place of those that :meth:`embed` makes."""

    @abstractmethod
    def rebuild(self) -> RewardHead:
        """The model as its directory holds it."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write a directory from which the model can be built; atomically."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of all weights as they are now."""


class FlowHead(nn.Module, ABC):
    """Turns speech tokens, hard or soft, into mel frames by flow matching."""

    codes: int
    """Size of the codebook."""
    mel_channels: int
    """Of the frames."""
    frames_per_token: int
    """Mel frames that a token lasts."""

    speaker_channels: int
    """Of the speaker vectors."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all codes: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its codes are")

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"]) -> Float[Tensor, "b s e"]:
        """Vectors of codes, or mixed of those of all codes."""

    @abstractmethod
    def loss(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """Squared error of the velocity at random times.

        Args:
            tokens: ids or mixtures of all codes; gradients reach the latter.
            token_mask: which are real; padding on the right.
            mel: the same utterances as mel; what has no counterpart among the tokens is left out, and conversely.
            mel_mask: which of its frames are real.
            speaker: vectors of the speakers.
            draws: everything random.
        """

    @abstractmethod
    def loss_embedded(
        self,
        vectors: Float[Tensor, "b s e"],
        token_mask: Bool[Tensor, "b s"],
        mel: Float[Tensor, "b f m"],
        mel_mask: Bool[Tensor, "b f"],
        speaker: Float[Tensor, "b d"],
        draws: FlowDraws,
    ) -> FlowLoss:
        """As :meth:`loss`, of vectors in the place of those that :meth:`embed` makes."""

    def draw(
        self, frames: Sequence[int], generators: Sequence[torch.Generator], rates: FlowRates | None, streaming: bool
    ) -> FlowDraws:
        """What is random in one training step; each utterance's share comes from its own generator.

        Args:
            frames: of each utterance.
            generators: one for each.
            rates: how often what happens.
            streaming: whether the batch is trained for streaming.
        """
        return FlowDraws.draw(frames, self.mel_channels, generators, rates, streaming)

    @abstractmethod
    def sample(
        self,
        tokens: Int[Tensor, "b s"] | Float[Tensor, "b s v"],
        token_mask: Bool[Tensor, "b s"],
        speaker: Float[Tensor, "b d"],
        prompt: FlowPrompt | None = None,
    ) -> MelFrames:
        """Mel of utterances; what one becomes does not depend on the others. The model should be in evaluation mode.

        Args:
            tokens: ids or mixtures.
            token_mask: which are real; padding on the right.
            speaker: vectors of the speakers.
            prompt: recordings to continue; their frames are not returned.
        """
