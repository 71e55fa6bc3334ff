# SPDX-License-Identifier: Apache-2.0
"""Scored steps with utterances and a reward model, made of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from steps import LAYOUT
from tiny import REWARD_SIZES
from torch.nn.utils.rnn import pad_sequence

from tts_align.batch import Batch, Scored, Totals
from tts_align.data.collate import as_utterances
from tts_align.data.records import Row
from tts_align.data.select import LabelledUtterance
from tts_align.logprobs import chosen_logp
from tts_align.models.base.layout import TokenRow, collate
from tts_align.models.reward.config import Attribute, RewardSizes
from tts_align.models.reward.model import RewardModel
from tts_align.objectives.base import Part, Parts, Step

CODES = LAYOUT.codebook_size
ATTRIBUTES = (
    Attribute("mood", "classes", ("happy", "sad")),
    Attribute("mos", "mos"),
    Attribute("age", "regression", centre=40.0, spread=10.0),
)
WANTED = ("あい", "いうえ", "え", "ああああ")
KNOWN: tuple[dict[str, str | float], ...] = (
    {"mood": "happy", "mos": 2.0},
    {"mood": "sad", "mos": 4.0, "age": 20.0},
    {"mos": 1.0},
    {"mood": "sad"},
)


def make_reward(seed: int = 0, **sizes: Any) -> RewardModel:
    """A reward model of random weights, with dropout, in evaluation mode."""
    torch.manual_seed(seed)
    knobs = REWARD_SIZES | {"ctc": True, "dropout": 0.2}
    return RewardModel(sizes=RewardSizes(CODES, "あいうえ", ATTRIBUTES, **(knobs | sizes))).requires_grad_(False).eval()


def spoken_step(
    lengths: Sequence[int],
    *,
    rich: bool = False,
    same: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    only: Sequence[int] | None = None,
    totals: Totals | None = None,
    reward: RewardModel | None = None,
) -> Step:
    """A step whose policy's logits are a leaf; what a row is does not depend on the rows beside it.

    Args:
        lengths: speech tokens of each row.
        rich: the rows have attributes.
        same: the policy is the reference.
        seed: of the numbers.
        dtype: of logits and reward model.
        only: these rows of them.
        totals: of the whole step; by default this is all of it.
        reward: the reward model.
    """
    chosen = range(len(lengths)) if only is None else only
    every = [torch.Generator().manual_seed(100 * seed + row) for row in chosen]
    rows, sources, reference, moves = [], [], [], []
    for row, random in zip(chosen, every, strict=True):
        speech_tokens = tuple(torch.randint(CODES, (lengths[row],), generator=random).tolist())
        attributes = KNOWN[row] if rich else {}
        manifest = Row(str(row), "x", "ja", speech=speech_tokens, transcript=WANTED[row], attributes=attributes)
        rows.append(TokenRow((1, 2), speech_tokens))
        sources.append(LabelledUtterance(manifest, manifest.sounds[0], row % 2 == 0))
        shape = (lengths[row] + 1, LAYOUT.vocabulary)
        reference.append(2 * torch.randn(shape, generator=random, dtype=torch.float64))
        moves.append(1.5 * torch.randn(shape, generator=random, dtype=torch.float64))
    collated = collate(rows, LAYOUT)
    theirs = torch.cat(reference).to(dtype)
    ours = (theirs if same else theirs + torch.cat(moves).to(dtype)).clone().requires_grad_()
    desirable = torch.tensor([source.desirable for source in sources])
    if totals is None:
        counts = collated.mask.sum(-1)
        totals = Totals(len(rows), int(counts.sum()), int(desirable.sum()), int(counts[desirable].sum()))
    batch = Batch(
        collated, desirable, totals, utterances=as_utterances(sources, rows, [900 + row for row in chosen], LAYOUT)
    )
    policy = Scored(collated.scatter(chosen_logp(ours, collated.target)), collated.mask, ours)
    model = (reward or make_reward()).to(dtype)
    frozen = Scored(collated.scatter(chosen_logp(theirs, collated.target)), collated.mask, theirs)
    return Step(batch, policy, frozen, parts=Parts({Part.REWARD: model}))


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of ids, 0 behind them."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
