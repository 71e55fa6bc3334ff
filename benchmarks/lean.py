# SPDX-License-Identifier: Apache-2.0
"""The floor that ``step.py`` measures against: the leanest training loop that is still plain PyTorch.

Written from the papers, sharing no line with ``tts_align`` and no model code with transformers: rows one behind the
other without padding, causal attention row by row, the head at scored positions only and in chunks, fused AdamW,
clipping. No records, no logging, no checks, no resuming. Frozen numbers are computed while the clock stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Text ids and speech tokens."""
BETA, LOWER, UPPER = 0.1, -2.0, 2.0
CHUNK = 128
"""Positions of the head at a time: what a processor's cache holds of their logits."""


@dataclass(frozen=True)
class Rows:
    """What one optimiser step sees.

    Args:
        rows: text and speech; of pairs first all chosen, then all rejected.
        desirable: label of each.
        mismatched: rows of other speech, for KTO.
        log_ratio: log π⁺ − log π⁻ of each row's tokens, for TKTO.
    """

    rows: Sequence[Row]
    desirable: Tensor
    mismatched: Sequence[Row] = ()
    log_ratio: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Inputs:
    """Rows one behind the other: ids, positions, where targets are predicted, targets, and the row of each."""

    token: Tensor
    position: Tensor
    lengths: list[int]
    at: Tensor
    target: Tensor
    row: Tensor


class Model(nn.Module):
    """The same weights as one of ours, with the three embedding tables in one.

    Args:
        ours: a ``Qwen2CodecLM`` of the CosyVoice2 family; its weights are copied.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        tables = [ours.backbone.embed_tokens.weight, ours.llm_embedding.weight, ours.speech_embedding.weight]
        self.special, self.speech = len(tables[0]), len(tables[0]) + len(tables[1])
        self.end, self.sizes = ours.layout.end, ours.sizes
        self.table = nn.Parameter(torch.cat(tables).detach().clone())
        names = dict(ours.backbone.layers.named_parameters())
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(value.detach().clone()) for name, value in names.items()}
        )
        self.norm = nn.Parameter(ours.backbone.norm.weight.detach().clone())
        self.head = nn.Parameter(ours.llm_decoder.weight.detach().clone())
        self.head_bias = nn.Parameter(ours.llm_decoder.bias.detach().clone())

    def forward(self, inputs: Inputs) -> Tensor:
        """States that predict the targets."""
        sizes, hidden = self.sizes, F.embedding(inputs.token, self.table)
        width = sizes.hidden_size // sizes.heads
        rate = sizes.rope_theta ** (-torch.arange(0, width, 2, device=hidden.device) / width)
        angle = inputs.position[:, None, None] * rate
        cosine, sine = angle.cos(), angle.sin()

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

        for layer in range(sizes.layers):
            w = {name: self.weights[f"{layer}_{name}"] for name in NAMES}
            x = F.rms_norm(hidden, (sizes.hidden_size,), w["input_layernorm_weight"], sizes.rms_norm_eps)
            names = [f"self_attn_{one}_proj" for one in "qkv"]
            parts = (F.linear(x, w[f"{one}_weight"], w[f"{one}_bias"]) for one in names)
            q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
            q, k = turned(q), turned(k)
            rows = zip(*(part.split(inputs.lengths) for part in (q, k, v)), strict=True)
            mixed = torch.cat([attend(*row) for row in rows])
            hidden = hidden + F.linear(mixed, w["self_attn_o_proj_weight"])
            x = F.rms_norm(hidden, (sizes.hidden_size,), w["post_attention_layernorm_weight"], sizes.rms_norm_eps)
            gated = F.silu(F.linear(x, w["mlp_gate_proj_weight"])) * F.linear(x, w["mlp_up_proj_weight"])
            hidden = hidden + F.linear(gated, w["mlp_down_proj_weight"])
        return F.rms_norm(hidden[inputs.at], (sizes.hidden_size,), self.norm, sizes.rms_norm_eps)

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Chunk by chunk."""
        for chunk in states.split(CHUNK):
            yield F.linear(chunk, self.head, self.head_bias)

    def logp(self, inputs: Inputs) -> Tensor:
        """Log-probability of each target."""
        pairs = zip(self.logits(self(inputs)), inputs.target.split(CHUNK), strict=True)
        return torch.cat([-F.cross_entropy(logits, target, reduction="none") for logits, target in pairs])

    def read(self, rows: Sequence[Row], device: str = "cpu") -> Inputs:
        """Arrange ``[sos, text, task, speech] -> [speech, end]``."""
        ids = [
            [self.special, *text, self.special + 1, *(token + self.speech for token in speech)] for text, speech in rows
        ]
        lengths = [len(one) for one in ids]
        starts = [sum(lengths[:i]) + 1 + len(text) for i, (text, _) in enumerate(rows)]
        counts = [len(speech) + 1 for _, speech in rows]
        found = (
            torch.tensor([token for one in ids for token in one]),
            torch.cat([torch.arange(length) for length in lengths]),
            torch.cat([torch.arange(count) + start for start, count in zip(starts, counts, strict=True)]),
            torch.tensor([token for _, speech in rows for token in (*speech, self.end)]),
            torch.repeat_interleave(torch.tensor(counts)),
        )
        token, position, at, target, row = (one.to(device) for one in found)
        return Inputs(token, position, lengths, at, target, row)


NAMES = (
    "input_layernorm_weight",
    "post_attention_layernorm_weight",
    *(f"self_attn_{one}_proj_{kind}" for one in "qkv" for kind in ("weight", "bias")),
    "self_attn_o_proj_weight",
    *(f"mlp_{one}_proj_weight" for one in ("gate", "up", "down")),
)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention inside one row: (l, heads, d) to (l, heads * d)."""
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


@dataclass
class Loop:
    """The lean loop.

    Args:
        objective: sft, dpo, kto or tkto.
        policy: trains.
        reference: frozen.
        learning_rate: of AdamW.
        device: of the models.
    """

    objective: str
    policy: Model
    reference: Model
    learning_rate: float
    device: str = "cpu"
    known: dict[Row, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the optimiser."""
        self.policy.to(self.device).train()
        self.reference.to(self.device).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate, fused=True)
        losses: dict[str, Callable[[Rows], Tensor]] = {
            "sft": self.sft, "dpo": self.dpo, "kto": self.kto, "tkto": self.tkto
        }  # fmt: skip
        self.loss = losses[self.objective]

    @torch.no_grad()
    def prepare(self, rows: Sequence[Row]) -> None:
        """Compute what the reference says of rows, once."""
        for row in rows:
            if row not in self.known:
                self.known[row] = self.reference.logp(self.reference.read([row], self.device))

    def step(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """One optimiser step; gives loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach(), norm

    def _read(self, rows: Sequence[Row]) -> Inputs:
        return self.policy.read(rows, self.device)

    def _log_ratios(self, rows: Sequence[Row]) -> Tensor:
        inputs = self._read(rows)
        values = self.policy.logp(inputs) - torch.cat([self.known[row] for row in rows]).to(self.device)
        return values.new_zeros(len(rows)).index_add(0, inputs.row, values)

    def sft(self, rows: Rows) -> Tensor:
        """3F."""
        return -self.policy.logp(self._read(rows.rows)).mean()

    def dpo(self, rows: Rows) -> Tensor:
        """3F and a cached reference."""
        chosen, rejected = self._log_ratios(rows.rows).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def kto(self, rows: Rows) -> Tensor:
        """3F, 1F on mismatched rows, and a cached reference."""
        with torch.no_grad():
            others = self._log_ratios(rows.mismatched).mean().clamp(min=0)
        reward = self._log_ratios(rows.rows)
        sign = rows.desirable.to(self.device) * 2.0 - 1.0
        return (1 - torch.sigmoid(sign * BETA * (reward - others))).mean()

    def tkto(self, rows: Rows) -> Tensor:
        """3F, 1F of the reference for the exact KL, and cached token weights."""
        inputs = self._read(rows.rows)
        with torch.no_grad():
            references = list(self.reference.logits(self.reference(inputs)))
        rewards, divergences = [], []
        chunks = zip(self.policy.logits(self.policy(inputs)), references, inputs.target.split(CHUNK), strict=True)
        for logits, reference, target in chunks:
            ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
            rewards.append((ours.gather(1, target[:, None]) - theirs.gather(1, target[:, None]))[:, 0])
            with torch.no_grad():
                divergences.append((ours.exp() * (ours - theirs)).sum(-1))
        sign = (rows.desirable.to(self.device) * 2.0 - 1.0)[inputs.row]
        weight = (sign * torch.cat(list(rows.log_ratio)).to(self.device).clamp(LOWER, UPPER)).exp()
        value = torch.sigmoid(sign * BETA * (torch.cat(rewards) - torch.cat(divergences)))
        return -(weight * value).sum() / len(rows.rows)
