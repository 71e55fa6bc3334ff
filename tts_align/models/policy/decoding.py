# SPDX-License-Identifier: Apache-2.0
"""Speaking a batch of prompts with a preallocated key-value cache, a token at a time, waiting for the device rarely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tts_align.models.base.generation import Prompt, Sampling, Spoken
from tts_align.models.base.layout import Layout
from tts_align.models.policy.attention import RowAttention
from tts_align.models.policy.backbone import Backbone, Turn
from tts_align.models.policy.kernels import autocast_type, rms_norm
from tts_align.models.policy.matrices import half_type, layer_matrices, matrix
from tts_align.models.policy.sampling import draw, uniforms

POLLED_EVERY = {"cpu": 1}
"""Tokens between two looks at what has ended; a look waits for a GPU, so there it is rare."""
_POLLED_ELSEWHERE = 8
_GROWTH = 256
"""Columns by which the cache grows at least."""
_WORTH_MOVING = 7 / 8
"""Share of the utterances still alive at which the ended ones are moved out of the cache, which is a copy of it."""


@runtime_checkable
class Decoder(Protocol):
    """What of a language model the decoding loop uses."""

    layout: Layout
    backbone: Backbone
    llm_decoder: nn.Linear
    speech_embedding: nn.Embedding

    def embed(self, token: Int[Tensor, " l"], table: Int[Tensor, " l"]) -> Float[Tensor, "l h"]:
        """Vectors of ids, each from the embedding table that ``table`` names."""


@dataclass
class Cache:
    """Keys and values of all layers, each utterance ending at the same column.

    Args:
        keys: of each layer, utterance, head, column and channel.
        values: likewise.
        bias: 0 at the columns that an utterance may read, minus infinity at the others.
    """

    keys: Tensor  # (layers, b, k, columns, d)
    values: Tensor
    bias: Tensor  # (b, 1, 1, columns)

    @property
    def columns(self) -> int:
        """How many there are."""
        return self.keys.shape[3]

    def grow(self, columns: int) -> None:
        """Add empty columns."""
        self.keys, self.values = (functional.pad(part, (0, 0, 0, columns)) for part in (self.keys, self.values))
        self.bias = functional.pad(self.bias, (0, columns), value=-torch.inf)

    def keep(self, rows: Int[Tensor, " b"]) -> None:
        """Drop all utterances but these."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        self.bias = self.bias.index_select(0, rows)


class _Prefill:
    """Attention inside the prompts that also fills the cache, layer by layer.

    Args:
        attention: inside the prompts.
        cache: is filled.
        column: of each position of the prompts.
    """

    def __init__(self, attention: RowAttention, cache: Cache, column: Int[Tensor, " l"]) -> None:
        self.attention, self.cache, self.column, self.layer = attention, cache, column, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix, and remember keys and values."""
        place = self.attention.row, self.column
        for into, part in ((self.cache.keys, key), (self.cache.values, value)):
            # :: (b, k, columns, d) -> (b, columns, k, d), a view that is written to
            into[self.layer].transpose(1, 2).index_put_(place, part.to(into.dtype))
        self.layer += 1
        return self.attention(query, key, value)


class Decoding:
    """One batch on its way: prefill, then a token at a time.

    Args:
        model: speaks.
        prompts: what to say.
        sampling: how tokens are drawn.
        whole_cache: read all columns of the cache, empty ones too, so that every token is the same sequence of kernels;
            so with ``sampling.cuda_graphs``, which replays them as one graph.

    Raises:
        ValueError: ``sampling.cuda_graphs`` without a GPU.
    """

    def __init__(
        self, model: Decoder, prompts: Sequence[Prompt], sampling: Sampling, whole_cache: bool = False
    ) -> None:
        self.model, self.sampling, self.layout = model, sampling, model.layout
        self.device = model.llm_decoder.weight.device
        if sampling.cuda_graphs and self.device.type != "cuda":
            raise ValueError(
                f"model.sampling.cuda_graphs has no effect on a {self.device.type}: leave it out, or speak on a GPU"
            )
        self.graphed = sampling.cuda_graphs
        self.whole_cache = self.graphed or whole_cache
        self.polled_every = POLLED_EVERY.get(self.device.type, _POLLED_ELSEWHERE)
        words = [len(prompt.text) - prompt.prefix for prompt in prompts]
        self.shortest = self._tensor([int(sampling.min_ratio * n) for n in words])
        self.longest = self._tensor([max(int(sampling.max_ratio * n), 1) for n in words])
        self.steps = int(max(max(int(sampling.max_ratio * n), 1) for n in words)) + self.polled_every
        self.uniform = uniforms([prompt.seed for prompt in prompts], self.steps).to(self.device)
        self.spoken: list[Spoken | None] = [None] * len(prompts)
        self.row = list(range(len(prompts)))  # which utterance each row of the cache is
        # Only what has been drawn counts as repetition, not the speech tokens of a recording that is continued.
        self.recent = self._tensor([[-1] * sampling.repetition_window for _ in prompts])
        self.said = torch.zeros(len(prompts), self.steps, dtype=torch.long, device=self.device)
        self.ended_at = torch.full((len(prompts),), -1, dtype=torch.long, device=self.device)
        self.step = torch.zeros(1, dtype=torch.long, device=self.device)
        self.token = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        # A trainer's half precision would cast the weights anew for every token: it is done once.
        half = autocast_type(self.device.type)
        self.format = sampling.weights if half is None else str(half).removeprefix("torch.")
        self.prefill(prompts)
        self.layers = [layer_matrices(block, self.format) for block in model.backbone.blocks]
        self.head = matrix([model.llm_decoder], self.format)

    def _tensor(self, numbers: Sequence[int] | Sequence[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self.device, non_blocking=True)

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read all prompts, without padding; in the cache they stand so that they end together."""
        pairs = [self.layout.prompt(prompt.text, prompt.speech) for prompt in prompts]
        lengths = [len(token) for token, _ in pairs]
        count, longest = self._tensor(lengths), max(lengths)
        row = torch.repeat_interleave(self._tensor(range(len(pairs))), count, output_size=sum(lengths))
        end = count.cumsum(0)
        position = torch.arange(sum(lengths), device=self.device) - (end - count)[row]
        offset = functional.pad(end, (1, 0)).to(torch.int32)
        backbone = self.model.backbone
        self.cache = self._empty(len(prompts), longest + min(self.steps, _GROWTH))
        column = position + (longest - count)[row]
        self.cache.bias[:, 0, 0].index_put_((row, column), self.cache.bias.new_zeros(()))
        attention = _Prefill(RowAttention(lengths, offset, row, position), self.cache, column)
        token, table = (self._tensor([one for pair in pairs for one in pair[i]]) for i in (0, 1))
        hidden = backbone(self.model.embed(token, table), position, attention, end - 1)
        self.logits = self.model.llm_decoder(hidden).float()
        self.position, self.end = count, longest
        self.column = self._tensor([longest])

    def _empty(self, rows: int, columns: int) -> Cache:
        config = self.model.backbone.config
        heads = config.num_key_value_heads or config.num_attention_heads
        channels = config.hidden_size // config.num_attention_heads
        dtype = half_type(self.format) or self.model.speech_embedding.weight.dtype
        keys = torch.zeros(config.num_hidden_layers, rows, heads, columns, channels, dtype=dtype, device=self.device)
        bias = torch.full((rows, 1, 1, columns), -torch.inf, dtype=dtype, device=self.device)
        return Cache(keys, torch.zeros_like(keys), bias)

    def run(self, progress: Callable[[int], None] | None) -> list[Spoken]:
        """Decode until every utterance has ended."""
        autocast = autocast_type(self.device.type) is not None
        with torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            self.draw_token()
            done, tick = 1, None
            while True:
                if done % self.polled_every == 0:
                    rows = len(self.row)
                    if not self.poll(done, progress):
                        break
                    full = self.end + self.polled_every > self.cache.columns
                    if full:
                        self.cache.grow(max(_GROWTH, self.cache.columns // 2))
                    if full or rows != len(self.row):
                        tick = None  # other tensors than a graph was made of
                if tick is None:
                    tick = captured(self.tick, self.state()) if self.graphed else self.tick
                self.end += 1
                tick()
                done += 1
        return [one for one in self.spoken if one is not None]

    def state(self) -> list[Tensor]:
        """What a tick changes, but for columns of the cache that it writes again."""
        cache = [self.cache.bias]
        return [
            self.token,
            self.said,
            self.ended_at,
            self.step,
            self.recent,
            self.logits,
            self.position,
            self.column,
            *cache,
        ]

    def tick(self) -> None:
        """Feed the token that was drawn last, and draw the next one; nothing here waits for the device."""
        self.feed(self.token)
        self.draw_token()

    def draw_token(self) -> None:
        """Draw a token, or end-of-speech once the utterance is long enough, and note it."""
        end = self.layout.end
        held_back = self.shortest > self.step
        self.logits[:, self.layout.codebook_size : end] = -torch.inf
        self.logits[:, end + 1 :] = -torch.inf
        self.logits[:, end] = self.logits[:, end].masked_fill(held_back, -torch.inf)
        uniform = self.uniform.index_select(1, self.step)[:, 0]
        self.token.copy_(draw(self.logits, self.recent, uniform, self.sampling))
        self.said.index_copy_(1, self.step, self.token[:, None])
        first_end = (self.token == end) & (self.ended_at < 0)
        self.ended_at.copy_(torch.where(first_end, self.step, self.ended_at))
        if self.sampling.repetition_window:
            self.recent.copy_(torch.cat([self.recent[:, 1:], self.token[:, None]], 1))
        self.step.add_(1)

    def feed(self, token: Int[Tensor, " b"]) -> None:
        """Append a token to each sequence, and compute the logits of what follows it."""
        cache, columns = self.cache, self.cache.columns if self.whole_cache else self.end
        cache.bias.index_fill_(3, self.column, 0.0)
        bias = cache.bias[..., :columns]
        turn = Turn.of(self.position, self.model.backbone.rotary_emb.inv_freq)
        hidden = self.model.speech_embedding(token)
        for number, layer in enumerate(self.layers):
            both, value = layer.project(hidden, turn)
            query, key = both.split([both.shape[1] - value.shape[1], value.shape[1]], 1)
            dtype = cache.keys.dtype
            cache.keys[number].index_copy_(2, self.column, key[:, :, None].to(dtype))
            cache.values[number].index_copy_(2, self.column, value[:, :, None].to(dtype))
            # Heads that share keys stand as queries of one head: :: (b, n, d) -> (b, k, n / k, d)
            mixed = functional.scaled_dot_product_attention(
                query.unflatten(1, (value.shape[1], -1)).to(dtype),
                cache.keys[number, :, :, :columns],
                cache.values[number, :, :, :columns],
                bias,
            )
            hidden = layer.combine(hidden, mixed.flatten(1))  # :: (b, k, n / k, d) -> (b, n * d)
        norm = self.model.backbone.norm
        self.logits.copy_(self.head(rms_norm(hidden, norm.weight, norm.variance_epsilon)))
        self.position.add_(1)
        self.column.add_(1)

    def poll(self, done: int, progress: Callable[[int], None] | None) -> int:
        """Collect what has ended, and say how many utterances continue; the only place that waits for the device."""
        ended, longest = self.ended_at.tolist(), self.longest.tolist()
        alive = [i for i, at in enumerate(ended) if at < 0 and longest[i] > done]
        newly = [i for i in range(len(ended)) if self.spoken[self.row[i]] is None and i not in set(alive)]
        if newly:
            said = self.said[self._tensor(newly)].cpu()
            for i, tokens in zip(newly, said, strict=True):
                finished = 0 <= ended[i] < longest[i]
                self.spoken[self.row[i]] = Spoken(tokens[: ended[i] if finished else longest[i]].clone(), finished)
            if progress is not None:
                progress(len(newly))
        if alive and len(alive) <= _WORTH_MOVING * len(self.row):
            self.keep(alive)
        return len(alive)

    def keep(self, alive: list[int]) -> None:
        """Drop the utterances that have ended from the batch and from the cache."""
        rows = self._tensor(alive)
        self.row = [self.row[i] for i in alive]
        self.cache.keep(rows)
        for name in ("shortest", "longest", "uniform", "recent", "said", "ended_at", "logits", "position", "token"):
            setattr(self, name, getattr(self, name).index_select(0, rows))


def captured(tick: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """A function as one CUDA graph: replaying it is one launch.

    Args:
        tick: of static shapes; works in place on tensors that stay where they are.
        state: those of them whose contents must not change by the runs that warm it up.
    """
    before = [one.clone() for one in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            tick()
    torch.cuda.current_stream().wait_stream(stream)
    for one, saved in zip(state, before, strict=True):
        one.copy_(saved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tick()
    return graph.replay
