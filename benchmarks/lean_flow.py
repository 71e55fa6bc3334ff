# SPDX-License-Identifier: Apache-2.0
"""The floor of end-to-end training: CosyVoice 3's token-to-mel flow, and the losses of stages 2 and 3.

As ``lean_rewards.py``: frames of all rows one behind the other, attention and convolutions row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lean import CHUNK
from lean_rewards import Listener, Race, Spoken, Trained, Weights, mean_of_rows, mix
from torch import Tensor
from torch.nn import functional as F

PROMPTED, PROMPT_SHARE, DROPPED, SIGMA = 0.5, 0.3, 0.2, 1e-6
LM, VOICE = 0.1, 0.1
"""Weights of the language model's loss, and of the voice in the reward of stage 3; all others are 1."""


@dataclass(frozen=True)
class Draws:
    """What is random for one row: time, noise, how many frames are given, and whether it is told anything."""

    time: Tensor
    noise: Tensor
    given: int
    told: bool


class Flow(Weights):
    """A transformer over mel frames, told tokens and voice.

    Args:
        ours: a ``DiTFlow`` that repeats its tokens and predicts velocities, without patches.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__(ours)
        self.sizes = ours.sizes

    @property
    def table(self) -> Tensor:
        """Vectors of the speech tokens."""
        return self.weights["input_embedding_weight"]

    def draw(self, seed: int, mel: Tensor) -> Draws:
        """Of a row's own seed."""
        generator = torch.Generator().manual_seed(4 * seed + 1)
        time, prompted, told = torch.rand(3, generator=generator)
        given = int(torch.randint(int(PROMPT_SHARE * len(mel)) + 1, (), generator=generator))
        noise = torch.randn(mel.shape, generator=generator)
        return Draws(time, noise, given if prompted < PROMPTED else 0, bool(told >= DROPPED))

    def error(self, vectors: Tensor, mel: Sequence[Tensor], voice: Tensor, draws: Sequence[Draws]) -> Tensor:
        """Sum of squared errors of the velocity.

        Args:
            vectors: of the tokens of all rows.
            mel: of each row.
            voice: vector of each row's voice.
            draws: of each row.
        """
        lengths = [len(one) for one in mel]
        time = torch.stack([one.time for one in draws])
        told = torch.tensor([float(one.told) for one in draws])
        noise, target = torch.cat([one.noise for one in draws]), torch.cat(list(mel))
        voices = self.linear(F.normalize(voice, dim=1), "spk_embed_affine_layer") * told[:, None]
        known = [F.pad(one[: each.given * each.told], (0, 0, 0, len(one) - each.given * each.told))
                 for one, each in zip(mel, draws, strict=True)]  # fmt: skip
        tokens = vectors.split([length // self.sizes.frames_per_token for length in lengths])
        mean = [self._ahead(row) * keep for row, keep in zip(tokens, told, strict=True)]
        at = torch.cat([each.time.expand(length) for each, length in zip(draws, lengths, strict=True)])[:, None]
        noisy = (1 - (1 - SIGMA) * at) * noise + at * target
        spread = torch.cat([one.expand(length, -1) for one, length in zip(voices, lengths, strict=True)])
        given = torch.cat((noisy, torch.cat(known), torch.cat(mean), spread), -1)
        return (self._velocity(given, lengths, time) - (target - (1 - SIGMA) * noise)).square().sum()

    def _convolved(self, x: Tensor, name: str, groups: int = 1) -> Tensor:
        """(channels, positions), longer by what the kernel needs."""
        return F.conv1d(x[None], self.weights[f"{name}_weight"], self.weights[f"{name}_bias"], groups=groups)[0]

    def _ahead(self, row: Tensor) -> Tensor:
        """Tokens that have seen some of the next, as frames."""
        ahead = self._convolved(F.pad(row.T, (0, self.sizes.lookahead)), "pre_lookahead_layer_conv1")
        found = self._convolved(F.pad(F.leaky_relu(ahead), (2, 0)), "pre_lookahead_layer_conv2").T + row
        return found.repeat_interleave(self.sizes.frames_per_token, 0)

    def _placed(self, row: Tensor) -> Tensor:
        x, name = row.T, "decoder_estimator_input_embed_conv_pos_embed"
        for layer in (1, 2):
            padded = F.pad(x, (self.sizes.position_kernel - 1, 0))
            x = F.mish(self._convolved(padded, f"{name}_conv{layer}_0", self.sizes.position_groups))
        return x.T

    def _velocity(self, given: Tensor, lengths: list[int], time: Tensor) -> Tensor:
        sizes, name = self.sizes, "decoder_estimator"
        half = sizes.time_channels // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(1e4) / (half - 1)))
        angle = 1000 * time.double()[:, None] * rates
        waves = torch.cat((angle.sin(), angle.cos()), -1).float()
        told = self.linear(F.silu(self.linear(waves, f"{name}_time_embed_time_mlp_0")), f"{name}_time_embed_time_mlp_2")
        told = F.silu(told)
        turn = 10000 ** (-torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
        turn = torch.cat([torch.arange(length) for length in lengths])[:, None] * turn
        turn = torch.polar(torch.ones_like(turn), turn)[:, None]
        x = self.linear(given, f"{name}_input_embed_proj")
        x = x + torch.cat([self._placed(row) for row in x.split(lengths)])
        for layer in range(sizes.depth):
            block = f"{name}_transformer_blocks_{layer}"
            parts = self.linear(told, f"{block}_attn_norm_linear").chunk(6, -1)
            shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
            mixed = self._attend(modulated(x, lengths, scale, shift), lengths, turn, f"{block}_attn")
            x = gated(x, mixed, lengths, gate)
            inner = self.linear(modulated(x, lengths, scale_ff, shift_ff), f"{block}_ff_ff_0_0")
            x = gated(x, self.linear(F.gelu(inner, approximate="tanh"), f"{block}_ff_ff_2"), lengths, gate_ff)
        scale, shift = self.linear(told, f"{name}_norm_out_linear").chunk(2, -1)
        return self.linear(modulated(x, lengths, scale, shift), f"{name}_proj_out")

    def _attend(self, x: Tensor, lengths: list[int], turn: Tensor, name: str) -> Tensor:
        query, key, value = (
            self.linear(x, f"{name}_to_{one}").unflatten(-1, (self.sizes.heads, -1)) for one in ("q", "k", "v")
        )
        query, key = (torch.cat((turned(one[:, :1], turn), one[:, 1:]), 1) for one in (query, key))
        rows = zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
        return self.linear(torch.cat([mix(*row, False) for row in rows]), f"{name}_to_out_0")


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def modulated(x: Tensor, lengths: list[int], scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise, then scale and shift each row by its own."""
    rows = zip(F.layer_norm(x, x.shape[-1:], eps=1e-6).split(lengths), 1 + scale, shift, strict=True)
    return torch.cat([torch.addcmul(b, row, a) for row, a, b in rows])


def gated(x: Tensor, added: Tensor, lengths: list[int], gate: Tensor) -> Tensor:
    """Add, each row through its own gate."""
    rows = zip(x.split(lengths), added.split(lengths), gate, strict=True)
    return torch.cat([torch.addcmul(row, more, one) for row, more, one in rows])


class AnchoredRace(Race):
    """With the cross-entropy of the stored tokens.

    Args:
        target: stored tokens and ends.
        rest: see :class:`lean_rewards.Race`.
    """

    def __init__(self, target: Tensor, *rest: Any) -> None:
        self.target, self.total = target.split(CHUNK), torch.zeros(())
        self.weight = LM / len(target)
        super().__init__(*rest)

    def look(self, logits: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """The gradient of the cross-entropy is p, less 1 at the target."""
        target = self.target[chunk][:, None]
        logp = logits.log_softmax(-1)
        self.total -= logp.gather(1, target).sum()
        p = logp.exp_()
        return p, (p * self.weight).scatter_add_(1, target, p.new_full(target.shape, -self.weight))


@dataclass
class E2E(Trained):
    """Stage 2 trains policy, flow and reward model on frozen tokens; stage 3 has no loss of the reward model, but more.

    Args:
        listener: the reward model; it trains if it is among the models.
        voices: how many there are.
    """

    listener: Listener
    voices: int

    def __post_init__(self) -> None:
        """Freeze what does not train."""
        super().__post_init__()
        self.second = self.listener not in self.models
        self.listener.requires_grad_(not self.second)

    def backward(self, rows: Spoken) -> Tensor:
        """Stage 2: 3F of all three; stage 3: 3F of the policy, 6F of the flow, the reward model to its input."""
        policy, flow = self.models[:2]
        speech = torch.cat(rows.speech)
        voice = F.one_hot(rows.voice, self.voices).float()
        draws = [flow.draw(seed, mel) for seed, mel in zip(rows.seeds, rows.mel, strict=True)]
        numbers = sum(mel.numel() for mel in rows.mel)

        def error(vectors: Tensor) -> Tensor:
            return flow.error(vectors, rows.mel, voice, draws) / numbers

        loss = error(F.embedding(speech, flow.table))
        if self.second:
            loss.backward()
            return loss.detach() + self._sampled(rows, error)
        loss = loss - LM * policy.logp(policy.read(rows.rows)).mean() + self._heard(rows, speech)
        loss.backward()
        return loss

    def _heard(self, rows: Spoken, speech: Tensor) -> Tensor:
        lengths = [len(row) for row in rows.speech]
        hidden = self.listener.encode(F.embedding(speech, self.listener.table), lengths)
        letters = sum(map(len, rows.letters))
        asr = self.listener.asr(hidden, lengths, rows.letters).sum() / (letters + len(lengths))
        ctc = self.listener.ctc(hidden, lengths, rows.letters).sum() / letters
        return -(asr + ctc + self.listener.voice(hidden, lengths, rows.voice).mean())

    def _sampled(self, rows: Spoken, error: Callable[[Tensor], Tensor]) -> Tensor:
        policy, flow = self.models[:2]
        inputs, lengths = policy.read(rows.rows), [len(row) for row in rows.speech]
        states, size = policy(inputs), len(self.listener.table)
        with torch.no_grad():
            seeds = [4 * seed + 2 for seed in rows.seeds]
            race = AnchoredRace(inputs.target, policy, states, size, seeds, [length + 1 for length in lengths])
        real = inputs.target < size
        chosen = race.chosen[real]
        told, heard = (F.embedding(chosen, one.table).detach().requires_grad_() for one in (flow, self.listener))
        hidden = self.listener.encode(heard, lengths)
        letters = self.listener.asr(hidden, lengths, rows.letters)
        rewards = mean_of_rows(letters, [len(row) + 1 for row in rows.letters])
        rewards = rewards + VOICE * self.listener.voice(hidden, lengths, rows.voice)
        loss = error(told) - rewards.mean()
        loss.backward()
        with torch.no_grad():
            flow.table.grad.index_add_(0, chosen, told.grad)
            pulls = []
            for leaf, table in ((told, flow.table), (heard, self.listener.table)):
                pull = leaf.new_zeros(len(states), leaf.shape[-1])
                pull[real] = leaf.grad
                pulls.append((pull, table))
            race.backward(pulls)
        return loss.detach() + race.weight * race.total
