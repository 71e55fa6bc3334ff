# SPDX-License-Identifier: Apache-2.0
"""The policy: a language model over speech tokens, given text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tts_align.batch import Batch, Rows, Scored
from tts_align.models.base.generation import Context, Encoded, Prompt, Sampling, Spoken
from tts_align.models.base.layout import Layout
from tts_align.models.base.precision import Float32Buffers
from tts_align.models.base.rollouts import roll_out
from tts_align.utils.sharded import whole

_PLAIN = Context()


class CodecLM(Float32Buffers, ABC):
    """A language model over speech tokens, given text.

    A final class is built from a directory and can be built again from it: the reference is never a copy of the policy.
    """

    layout: Layout
    """Special ids and block sizes of its sequences."""

    @property
    def table(self) -> nn.Embedding:
        """Vectors of all speech tokens: a row for each, special tokens behind them."""
        raise NotImplementedError(f"{type(self).__name__} does not say where the vectors of its speech tokens are")

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Layers that each run once in a forward, one after the other; sharded training gathers one at a time."""
        return ()

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
    def text_identity(self) -> str | None:
        """Digest of all that :meth:`encode_text` depends on, so that its results may be stored; ``None`` if not."""
        return None

    @property
    def speakers(self) -> tuple[str, ...] | None:
        """Voices it can be asked for; ``None`` when a name is just a name."""
        return None

    def use_voices(self, path: Path) -> None:
        """Speak from now on in the voices of a file of recordings, which a test set brings.

        Args:
            path: JSONL file of voices: speaker, audio, text (its transcript).

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"{type(self).__name__} cannot speak in the voices of recordings, which {path} lists")

    def pieces(self, text: str) -> tuple[str, ...]:
        """What is spoken of a text, one utterance after the other; by default the text as it is."""
        return (text,)

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
        """The texts of a batch with utterances, spoken anew; see :mod:`tts_align.models.base.rollouts`."""
        with whole(self):  # the utterances of processes are not equally long
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
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
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

    def speech_digest(self) -> str:
        """Digest of all that its speech depends on besides the request: its weights, by default."""
        return self.digest()
