# SPDX-License-Identifier: Apache-2.0
"""The floor that ``step.py`` measures against: a training loop with only the passes each objective cannot do without.

Written from the papers, sharing no token with ``tts_align``: one embedding table, a transformers Qwen2 backbone, the
head, AdamW and clipping. Frozen numbers are computed while the clock stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Model

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Text ids and speech tokens."""
BETA, LOWER, UPPER = 0.1, -2.0, 2.0


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
    """Rows as the model reads them; ``target`` is −100 where nothing is predicted."""

    token: Tensor
    position: Tensor
    mask: Tensor | None
    at: Tensor | None
    target: Tensor
    row: Tensor
    where: Tensor

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Numbers of each row's targets, one after the other, to where the model predicts them."""
        flat = torch.cat(list(values)).to(self.target.device)
        return flat if self.at is not None else flat.new_zeros(len(self.target)).index_put((self.where,), flat)


class Model(nn.Module):
    """The same weights as one of ours, with the three embedding tables in one.

    Args:
        ours: a ``Qwen2CodecLM`` of the CosyVoice2 family; its weights are copied.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        tables = [ours.backbone.embed_tokens.weight, ours.llm_embedding.weight, ours.speech_embedding.weight]
        self.special, self.speech = len(tables[0]), len(tables[0]) + len(tables[1])
        self.end = ours.layout.end
        config = ours.sizes.backbone()
        config.vocab_size = self.speech + len(tables[2])
        self.backbone = Qwen2Model(config)
        state = {**ours.backbone.state_dict(), "embed_tokens.weight": torch.cat(tables)}
        self.backbone.load_state_dict(state)
        self.head = nn.Linear(config.hidden_size, len(tables[2]))
        self.head.load_state_dict(ours.llm_decoder.state_dict())

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits at the targets, or everywhere."""
        hidden = self.backbone(
            input_ids=inputs.token,
            position_ids=inputs.position,
            attention_mask={"full_attention": inputs.mask},
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        return self.head(hidden if inputs.at is None else hidden[inputs.at])

    def read(self, rows: Sequence[Row], packed: bool, device: str = "cpu") -> Inputs:
        """Arrange ``[sos, text, task, speech] -> [speech, end]``, several rows to a bin or each one padded."""
        ids = [
            [self.special, *text, self.special + 1, *(code + self.speech for code in speech)] for text, speech in rows
        ]
        length = max(map(len, ids))
        bins: list[list[int]] = []
        for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
            fits = (one for one in bins if sum(len(ids[j]) for j in one) + len(ids[i]) <= length)
            found = next(fits, None) if packed else None
            if found is None:
                bins.append([i])
            else:
                found.append(i)
        token, position, segment = (torch.zeros(len(bins), length, dtype=torch.long) for _ in range(3))
        starts = [0] * len(ids)
        for b, members in enumerate(bins):
            start = 0
            for i in members:
                inside = slice(start, start + len(ids[i]))
                token[b, inside], position[b, inside] = torch.tensor(ids[i]), torch.arange(len(ids[i]))
                segment[b, inside] = i + 1
                starts[i] = b * length + start + 1 + len(rows[i][0])
                start += len(ids[i])
        where = torch.cat([torch.arange(len(row[1]) + 1) + start for start, row in zip(starts, rows, strict=True)])
        target = torch.tensor([code for _, speech in rows for code in (*speech, self.end)])
        row = torch.repeat_interleave(torch.tensor([len(speech) + 1 for _, speech in rows]))
        segment = segment.to(device)
        if packed:
            same = segment[:, :, None] == segment[:, None, :]
            mask = (same & torch.ones(length, length, dtype=torch.bool, device=device).tril())[:, None]
        else:
            # Every position is scored and what is not a target ignored, as in a loop written without much thought.
            mask = None
            target = torch.full((token.numel(),), -100).index_put((where,), target)
            row = torch.zeros(token.numel(), dtype=torch.long).index_put((where,), row)
        tensors = (one.to(device) for one in (token, position, where, target, row))
        token, position, where, target, row = tensors
        return Inputs(token, position, mask, where if packed else None, target, row, where)


def logp_of(logits: Tensor, inputs: Inputs) -> Tensor:
    """Log-probability of each target; 0 where there is none."""
    return -F.cross_entropy(logits, inputs.target, ignore_index=-100, reduction="none")


@dataclass
class Loop:
    """One contender.

    Args:
        objective: sft, dpo, kto or tkto.
        policy: trains.
        reference: frozen.
        packed: several rows to a bin, head at the targets only; otherwise padded, head everywhere.
        learning_rate: of AdamW.
        device: of the models.
    """

    objective: str
    policy: Model
    reference: Model
    packed: bool
    learning_rate: float
    device: str = "cpu"
    known: dict[Row, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the optimiser."""
        self.policy.to(self.device).train()
        self.reference.to(self.device).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate)
        losses: dict[str, Callable[[Rows], Tensor]] = {
            "sft": self.sft, "dpo": self.dpo, "kto": self.kto, "tkto": self.tkto
        }  # fmt: skip
        self.loss = losses[self.objective]

    @torch.no_grad()
    def prepare(self, rows: Sequence[Row]) -> None:
        """Compute what the reference says of rows, once."""
        for row in rows:
            if row not in self.known:
                inputs = self.reference.read([row], packed=True, device=self.device)
                self.known[row] = logp_of(self.reference(inputs), inputs)

    def step(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """One optimiser step; gives loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach(), norm

    def _read(self, rows: Sequence[Row]) -> Inputs:
        return self.policy.read(rows, self.packed, self.device)

    def _sums(self, values: Tensor, inputs: Inputs, count: int) -> Tensor:
        return values.new_zeros(count).index_add(0, inputs.row, values)

    def _log_ratios(self, rows: Sequence[Row], inputs: Inputs) -> Tensor:
        known = inputs.spread([self.known[row] for row in rows])
        return self._sums(logp_of(self.policy(inputs), inputs) - known, inputs, len(rows))

    def sft(self, rows: Rows) -> Tensor:
        """3F."""
        inputs = self._read(rows.rows)
        return -logp_of(self.policy(inputs), inputs).sum() / len(inputs.where)

    def dpo(self, rows: Rows) -> Tensor:
        """3F and a cached reference."""
        chosen, rejected = self._log_ratios(rows.rows, self._read(rows.rows)).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    def kto(self, rows: Rows) -> Tensor:
        """3F, 1F on mismatched rows, and a cached reference."""
        with torch.no_grad():
            others = self._log_ratios(rows.mismatched, self._read(rows.mismatched)).mean().clamp(min=0)
        reward = self._log_ratios(rows.rows, self._read(rows.rows))
        sign = rows.desirable.to(self.device) * 2.0 - 1.0
        return (1 - torch.sigmoid(sign * BETA * (reward - others))).mean()

    def tkto(self, rows: Rows) -> Tensor:
        """3F, 1F of the reference for the exact KL, and cached token weights."""
        inputs = self._read(rows.rows)
        with torch.no_grad():
            reference = self.reference(inputs).log_softmax(-1)
        policy = self.policy(inputs).log_softmax(-1)
        target = inputs.target.clamp(min=0)[:, None]
        reward = (policy.gather(1, target) - reference.gather(1, target))[:, 0]
        sign = (rows.desirable.to(self.device) * 2.0 - 1.0)[inputs.row]
        with torch.no_grad():
            kl = (policy.exp() * (policy - reference)).sum(-1)
            weight = (sign * inputs.spread(rows.log_ratio).clamp(LOWER, UPPER)).exp() * (inputs.target >= 0)
        return -(weight * torch.sigmoid(sign * BETA * (reward - kl))).sum() / len(rows.rows)
