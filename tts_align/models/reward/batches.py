# SPDX-License-Identifier: Apache-2.0
"""Utterances in batches of similar length, as a reward model reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class SpeechBatch:
    """Some utterances, padded on the right.

    Args:
        places: places (r) of these utterances among all of them.
        tokens: speech tokens (r, s).
        mask: which are real (r, s).
    """

    places: list[int]
    tokens: Int[Tensor, "r s"]
    mask: Bool[Tensor, "r s"]


def speech_batches(speech: Sequence[Sequence[int]], batch_rows: int) -> Iterator[SpeechBatch]:
    """Utterances from short to long, a batch at a time; those without speech tokens are left out."""
    places = sorted((place for place, said in enumerate(speech) if said), key=lambda place: len(speech[place]))
    for start in range(0, len(places), batch_rows):
        some = places[start : start + batch_rows]
        # :: (r, s)
        tokens = pad_sequence([torch.tensor(speech[place]) for place in some], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(speech[place]) for place in some])[:, None]
        yield SpeechBatch(some, tokens, mask)
