# SPDX-License-Identifier: Apache-2.0
"""Speaking a batch of prompts with a key-value cache, a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Model

from tts_align.models.base.generation import Prompt, Sampling, Spoken
from tts_align.models.base.layout import Layout
from tts_align.models.policy.sampling import draw, uniforms


@runtime_checkable
class Decoder(Protocol):
    """What of a language model the decoding loop uses."""

    layout: Layout
    backbone: Qwen2Model
    llm_decoder: nn.Linear
    speech_embedding: nn.Embedding

    def embed(self, token: Int[Tensor, "b l"], table: Int[Tensor, "b l"]) -> Float[Tensor, "b l h"]:
        """Vectors of ids, each from the embedding table that ``table`` names."""


class Decoding:
    """One batch on its way: prefill, then a token at a time."""

    def __init__(self, model: Decoder, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.model, self.sampling, self.layout = model, sampling, model.layout
        self.device = model.llm_decoder.weight.device
        words = [len(prompt.text) - prompt.prefix for prompt in prompts]
        self.shortest = torch.tensor([int(sampling.min_ratio * n) for n in words], device=self.device)
        longest = [max(int(sampling.max_ratio * n), 1) for n in words]
        self.longest = torch.tensor(longest, device=self.device)
        self.uniform = uniforms([prompt.seed for prompt in prompts], max(longest)).to(self.device)
        self.speech: list[list[int]] = [[] for _ in prompts]
        self.finished = [False] * len(prompts)
        self.row = torch.arange(len(prompts), device=self.device)  # which utterance each row of the cache is
        window = sampling.repetition_window
        # Only what has been drawn counts as repetition, not the speech tokens of a recording that is continued.
        self.recent = torch.full((len(prompts), window), -1, dtype=torch.long, device=self.device)
        self.prefill(prompts)

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read all prompts, padded on the left so that they end together."""
        pairs = [self.layout.prompt(prompt.text, prompt.speech) for prompt in prompts]
        length = max(len(token) for token, _ in pairs)
        token, table = (np.zeros((len(pairs), length), np.int64) for _ in range(2))
        real = np.zeros((len(pairs), length), bool)
        for i, (ids, tables) in enumerate(pairs):
            start = length - len(ids)
            token[i, start:], table[i, start:], real[i, start:] = ids, tables, True
        self.real = torch.from_numpy(real).to(self.device)
        self.position = self.real.long().cumsum(-1) - 1
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        eye = torch.eye(length, dtype=torch.bool, device=self.device)
        mask = (causal & self.real[:, None, :] | eye)[:, None]
        self.cache = DynamicCache(config=self.model.backbone.config)
        vectors = self.model.embed(torch.from_numpy(token).to(self.device), torch.from_numpy(table).to(self.device))
        self.hidden = self.advance(vectors, self.position.clamp(min=0), mask)
        self.position = self.position[:, -1:]

    def advance(
        self, vectors: Float[Tensor, "b l h"], position: Int[Tensor, "b l"], mask: Bool[Tensor, "b 1 l k"]
    ) -> Float[Tensor, "b h"]:
        """Feed vectors and return the state of the last position."""
        out: Any = self.model.backbone(
            inputs_embeds=vectors,
            position_ids=position,
            attention_mask={"full_attention": mask},
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    def run(self, progress: Callable[[int], None] | None) -> list[Spoken]:
        """Decode until every utterance has ended."""
        step = 0
        while len(self.row):
            token = self.next_token(step)
            ended = token == self.layout.end
            for row, code, end in zip(self.row.tolist(), token.tolist(), ended.tolist(), strict=True):
                if end:
                    self.finished[row] = True
                else:
                    self.speech[row].append(code)
            step += 1
            alive = ~ended & (self.longest[self.row] > step)
            if progress is not None and not alive.all():
                progress(int((~alive).sum()))
            if not alive.any():
                break
            self.keep(alive)
            self.feed(token[alive])
        return [
            Spoken(torch.tensor(speech_tokens, dtype=torch.long), end)
            for speech_tokens, end in zip(self.speech, self.finished, strict=True)
        ]

    def next_token(self, step: int) -> Int[Tensor, " b"]:
        """Draw a token, or end-of-speech once the utterance is long enough."""
        logits = self.model.llm_decoder(self.hidden).float()
        end = logits[:, self.layout.end].masked_fill(self.shortest[self.row] > step, -torch.inf)
        logits[:, self.layout.codebook_size :] = -torch.inf
        logits[:, self.layout.end] = end
        return draw(logits, self.recent, self.uniform[self.row, step], self.sampling)

    def keep(self, alive: Bool[Tensor, " b"]) -> None:
        """Drop the utterances that have ended from the batch and from the cache."""
        if alive.all():
            return
        self.cache.batch_select_indices(alive.nonzero()[:, 0])
        self.row, self.real, self.position = self.row[alive], self.real[alive], self.position[alive]
        self.recent = self.recent[alive]

    def feed(self, token: Int[Tensor, " b"]) -> None:
        """Append the drawn speech tokens to the sequences."""
        if self.sampling.repetition_window:
            self.recent = torch.cat([self.recent[:, 1:], token[:, None]], 1)
        self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], 1)
        self.position = self.position + 1
        vectors = self.model.speech_embedding(token)[:, None]
        self.hidden = self.advance(vectors, self.position, self.real[:, None, None, :])
