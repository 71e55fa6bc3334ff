# SPDX-License-Identifier: Apache-2.0
"""The floor of objectives with a reward model: its own training, and DiffRO.

As ``lean.py``: plain PyTorch from the papers, sharing no line with ``tts_align``; linear layers over the tokens of all
rows one behind the other, attention row by row. What is large, the distributions over all speech tokens, has its
gradient written by hand, a chunk of positions at a time, so that nothing of it is kept for autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lean import BETA, CHUNK, Inputs, Model, Row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

CLIP, ROW_CLIP = 1.0, 1.0
"""Largest norm of the gradient of all weights, and of one row's reward gradient."""
WAVELENGTH = 1e4
"""Longest of the positions' sines, in turns."""


@dataclass(frozen=True)
class Spoken:
    """What one optimiser step sees.

    Args:
        rows: text and speech, for the policy.
        letters: text ids of each row, for the reward model.
        voice: number of the voice of each row.
        seeds: of each row's noise.
        mel: frames of each row, for the flow.
    """

    rows: Sequence[Row]
    letters: Sequence[Tensor]
    voice: Tensor
    seeds: Sequence[int]
    mel: Sequence[Tensor] = ()
    mismatched: tuple[Row, ...] = ()

    @property
    def speech(self) -> list[Tensor]:
        """Speech tokens of each row."""
        return [torch.tensor(speech) for _, speech in self.rows]


class Weights(nn.Module):
    """Copies of another model's weights under their names, and the layers that most networks have.

    Args:
        ours: whose weights are copied.
    """

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        values = {name.replace(".", "_"): value.detach().clone() for name, value in ours.named_parameters()}
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Linear layer."""
        return F.linear(x, self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])

    def normed(self, x: Tensor, name: str) -> Tensor:
        """Layer normalisation."""
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])


class Listener(Weights):
    """The reward model: encoder of speech tokens, text decoder, CTC and one pooled property of the utterance.

    Args:
        ours: a ``RewardModel``.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.sizes = ours.sizes

    @property
    def table(self) -> Tensor:
        """Vectors of the speech tokens."""
        return self.weights["embedding_weight"]

    def encode(self, vectors: Tensor, lengths: list[int]) -> Tensor:
        """States of speech."""
        hidden = vectors + waves(lengths, self.sizes.width)
        for layer in range(self.sizes.layers):
            hidden = self._block(hidden, f"blocks_{layer}", lengths, False)
        return self.normed(hidden, "norm")

    def _block(
        self,
        hidden: Tensor,
        name: str,
        lengths: list[int],
        causal: bool,
        memory: tuple[Tensor, list[int]] | None = None,
    ) -> Tensor:
        x = self.normed(hidden, f"{name}_attention_norm")
        hidden = hidden + self._attend(x, lengths, x, lengths, f"{name}_attention", causal)
        if memory is not None:
            x = self.normed(hidden, f"{name}_memory_norm")
            hidden = hidden + self._attend(x, lengths, *memory, f"{name}_memory_attention", False)
        x = self.normed(hidden, f"{name}_feed_forward_0")
        return hidden + self.linear(F.gelu(self.linear(x, f"{name}_feed_forward_1")), f"{name}_feed_forward_4")

    def _attend(
        self, x: Tensor, lengths: list[int], memory: Tensor, seen: list[int], name: str, causal: bool
    ) -> Tensor:
        parts = self.linear(x, f"{name}_query"), *self.linear(memory, f"{name}_key_value").chunk(2, -1)
        query, key, value = (part.unflatten(-1, (self.sizes.heads, -1)) for part in parts)
        rows = zip(query.split(lengths), key.split(seen), value.split(seen), strict=True)
        return self.linear(torch.cat([mix(*row, causal) for row in rows]), f"{name}_out")

    def asr(self, hidden: Tensor, lengths: list[int], letters: Sequence[Tensor]) -> Tensor:
        """Log-probability of each letter and of the end, row by row, 0 being both start and end."""
        end = letters[0].new_zeros(1)
        given, target = (torch.cat([part for row in rows for part in row]) for rows in _shifted(letters, end))
        counts = [len(row) + 1 for row in letters]
        state = F.embedding(given, self.weights["decoder_embedding_weight"]) + waves(counts, self.sizes.width)
        for layer in range(self.sizes.decoder_layers):
            state = self._block(state, f"decoder_blocks_{layer}", counts, True, (hidden, lengths))
        logits = self.linear(self.normed(state, "decoder_norm"), "decoder_head")
        return -F.cross_entropy(logits, target, reduction="none")

    def ctc(self, hidden: Tensor, lengths: list[int], letters: Sequence[Tensor]) -> Tensor:
        """Log-probability of each text, summed over alignments; 0 where the speech is too short."""
        logp = self.linear(hidden, "ctc_head").log_softmax(-1)
        counts = [len(row) for row in letters]
        padded = pad_sequence(list(logp.split(lengths)))
        return -F.ctc_loss(padded, torch.cat(list(letters)), lengths, counts, reduction="none", zero_infinity=True)

    def voice(self, hidden: Tensor, lengths: list[int], voice: Tensor) -> Tensor:
        """Log-probability of each row's voice, by attention pooling."""
        scores = self.linear(hidden, "pooled_0_attention")
        rows = zip(scores.split(lengths), hidden.split(lengths), strict=True)
        pooled = torch.stack([share.softmax(0)[:, 0] @ states for share, states in rows])
        return -F.cross_entropy(self.linear(pooled, "pooled_0_head"), voice, reduction="none")


def _shifted(letters: Sequence[Tensor], end: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    return [(end, row) for row in letters], [(row, end) for row in letters]


def mix(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention of one row: (q, heads, d) to (q, heads * d)."""
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts, is_causal=causal)[0].transpose(0, 1).flatten(1)


def waves(lengths: Sequence[int], width: int) -> Tensor:
    """Sinusoidal positions of rows."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(WAVELENGTH) / (width // 2 - 1)))
    angles = torch.arange(max(lengths))[:, None] * rates
    table = torch.cat((angles.sin(), angles.cos()), -1)
    return torch.cat([table[:length] for length in lengths])


def mean_of_rows(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean of each row's numbers."""
    return torch.stack([row.mean() for row in values.split(list(counts))])


@dataclass
class Trained:
    """A loop that trains some models: backward is the subclass's.

    Args:
        models: what trains; their weights get gradients.
        learning_rate: of AdamW.
    """

    models: Sequence[nn.Module]
    learning_rate: float

    def __post_init__(self) -> None:
        """Build the optimiser."""
        self.parameters = [value for model in self.models for value in model.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate, fused=True)

    def step(self, rows: Spoken) -> tuple[Tensor, Tensor]:
        """One optimiser step; gives loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(rows)
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return loss.detach(), norm

    def backward(self, rows: Spoken) -> Tensor:
        """Loss, after its gradients are there."""
        raise NotImplementedError


class MTR(Trained):
    """Training of the reward model: text by decoder and by CTC, each a sum over letters, and the voice."""

    def backward(self, rows: Spoken) -> Tensor:
        """3F of the reward model."""
        (listener,) = self.models
        lengths = [len(row) for row in rows.speech]
        hidden = listener.encode(F.embedding(torch.cat(rows.speech), listener.table), lengths)
        asr = listener.asr(hidden, lengths, rows.letters).sum()
        ctc = listener.ctc(hidden, lengths, rows.letters).sum()
        loss = -(asr + ctc + listener.voice(hidden, lengths, rows.voice).sum()) / len(lengths)
        loss.backward()
        return loss


class Race:
    """Tokens drawn from a policy's distributions, with the gradients of all that is asked of these, by hand.

    A token of probability p rings at E / p, E a standard exponential number: the first is the Gumbel sample, and the
    shares p / E its Gumbel-softmax at temperature 1.

    Args:
        policy: whose distributions.
        states: that predict the targets, with their graph.
        codebook_size: the leading ids, which are drawn.
        seeds: of each row.
        counts: targets of each row.
    """

    def __init__(
        self, policy: Model, states: Tensor, codebook_size: int, seeds: Sequence[int], counts: Sequence[int]
    ) -> None:
        self.policy, self.states, self.size = policy, states, codebook_size
        self.noise = torch.empty(len(states), codebook_size)
        for part, seed in zip(self.noise.split(list(counts)), seeds, strict=True):
            part.exponential_(generator=torch.Generator().manual_seed(seed))
        self.slopes: list[Tensor] = []
        self.shares: list[Tensor] = []
        chosen = []
        for i, noise in enumerate(self.noise.split(CHUNK)):
            p, slope = self.look(
                F.linear(states[i * CHUNK : (i + 1) * CHUNK].detach(), policy.head, policy.head_bias), i
            )
            share = torch.div(p[:, :codebook_size], noise, out=noise)
            chosen.append(share.argmax(-1))
            self.shares.append(share.div_(share.sum(-1, keepdim=True)))
            self.slopes.append(slope)
        self.chosen = torch.cat(chosen)

    def look(self, logits: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Probabilities of a chunk, and the gradient of all else that is asked of its logits."""
        raise NotImplementedError

    def backward(self, pulls: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Gradients of the policy.

        Args:
            pulls: gradients of the drawn tokens' vectors, at all targets, and the tables they were read from.
        """
        head, bias = self.policy.head, self.policy.head_bias
        head.grad, bias.grad, into = torch.zeros_like(head), torch.zeros_like(bias), torch.empty_like(self.states)
        for i, (slope, share) in enumerate(zip(self.slopes, self.shares, strict=True)):
            at = slice(i * CHUNK, (i + 1) * CHUNK)
            pull = sum(gradient[at] @ table.T for gradient, table in pulls)
            pull = share * (pull - torch.linalg.vecdot(share, pull)[:, None])
            slope[:, : self.size] += pull
            torch.mm(slope, head, out=into[at])
            head.grad.addmm_(slope.T, self.states[at])
            bias.grad += slope.sum(0)
        self.states.backward(into)


class DivergingRace(Race):
    """With the divergence from a reference.

    Args:
        reference: frozen.
        inputs: rows.
        rest: see :class:`Race`.
    """

    def __init__(self, reference: Model, inputs: Inputs, *rest: Any) -> None:
        self.reference, self.weight = reference, BETA / len(inputs.target)
        self.frozen, self.total = reference(inputs), torch.zeros(())
        super().__init__(*rest)

    def look(self, logits: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """The gradient of the mean KL is p (log p - log q - KL)."""
        frozen = self.frozen[chunk * CHUNK : (chunk + 1) * CHUNK]
        ours = logits.log_softmax(-1)
        ratio = ours - F.linear(frozen, self.reference.head, self.reference.head_bias).log_softmax(-1)
        p = ours.exp_()
        divergence = torch.linalg.vecdot(p, ratio)
        self.total += divergence.sum()
        return p, ratio.sub_(divergence[:, None]).mul_(p).mul_(self.weight)


@dataclass
class DiffRO(Trained):
    """DiffRO with its defaults: straight-through samples after the stored tokens, reward of the text, KL, clipping.

    Args:
        reference: frozen.
        listener: frozen.
    """

    reference: Model
    listener: Listener

    def __post_init__(self) -> None:
        """Freeze what does not train."""
        super().__post_init__()
        self.reference.requires_grad_(False)
        self.listener.requires_grad_(False)

    def backward(self, rows: Spoken) -> Tensor:
        """3F and 1F of the reference; the reward model forward, and backward to its input."""
        (policy,) = self.models
        inputs, lengths = policy.read(rows.rows), [len(row) for row in rows.speech]
        states, size = policy(inputs), len(self.listener.table)
        with torch.no_grad():
            counts = [length + 1 for length in lengths]
            race = DivergingRace(self.reference, inputs, policy, states, size, rows.seeds, counts)
        real = inputs.target < size
        vectors = F.embedding(race.chosen[real], self.listener.table).requires_grad_()
        letters = self.listener.asr(self.listener.encode(vectors, lengths), lengths, rows.letters)
        rewards = mean_of_rows(letters, [len(row) + 1 for row in rows.letters])
        (gradient,) = torch.autograd.grad(rewards.sum(), vectors)
        with torch.no_grad():
            for part in gradient.split(lengths):
                part.mul_(ROW_CLIP / part.norm().clamp(min=ROW_CLIP) / -len(lengths))
            pull = gradient.new_zeros(len(states), gradient.shape[-1])
            pull[real] = gradient
            race.backward([(pull, self.listener.table)])
        return race.weight * race.total - rewards.mean()
