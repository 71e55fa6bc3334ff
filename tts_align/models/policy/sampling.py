# SPDX-License-Identifier: Apache-2.0
"""Drawing the next speech token: nucleus, top-k, temperature and repetition-aware sampling, a whole batch at a time.

Repetition-aware sampling as in VALL-E 2 (arXiv 2406.05370): a token that already fills too large a share of the recent
window is drawn again from the whole distribution. Every draw is an inverse-CDF look-up of a number that belongs to the
utterance, so that a neighbour in the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tts_align.models.base.generation import Sampling


def uniforms(seeds: Sequence[int], steps: int) -> Float[Tensor, "b steps 2"]:
    """Two numbers in [0, 1) per utterance and step, made of the utterance's seed alone (Philox)."""
    draws = [np.random.Generator(np.random.Philox(seed)).random((steps, 2), dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(draws))


def nucleus(probability: Float[Tensor, "b v"], sampling: Sampling) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The most probable tokens, most probable first: (probability, 0 where cut; id).

    A token is kept while the tokens before it hold less than ``top_p`` and are fewer than ``top_k``; the first
    always is.

    Example:
        >>> kept, token = nucleus(torch.tensor([[0.1, 0.6, 0.3]]), Sampling(top_p=0.7, top_k=0))
        >>> token.tolist(), [round(p, 1) for p in kept[0].tolist()]
        ([[1, 2, 0]], [0.6, 0.3, 0.0])
    """
    kept, token = _largest(probability, sampling.top_k or probability.shape[-1])
    before = kept.cumsum(-1) - kept
    return torch.where(before < sampling.top_p, kept, 0.0), token


def _largest(values: Float[Tensor, "b v"], count: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The first entries of a stable descending sort, as in the published code: of equal ones those of lower id.

    Ties are common in half precision, and ``topk`` may take any of them. Where equal entries lie on both sides of the
    border they are made different, which takes longer; to look would wait for a GPU, so there they always are.
    """
    count = min(count, values.shape[-1])
    if values.device.type != "cpu":
        return _largest_by_key(values, count)
    if count < values.shape[-1]:
        best, token = values.topk(count + 1)
        border = best[:, count - 1]
        if not ((border == best[:, count]) & (border > 0)).any():
            token = token[:, :count].sort(-1).values
            best, order = values.gather(1, token).sort(dim=-1, descending=True, stable=True)
            return best, token.gather(1, order)
        if values.dtype == torch.float32:
            return _largest_by_key(values, count)
    best, token = values.sort(dim=-1, descending=True, stable=True)
    return best[:, :count], token[:, :count]


def _largest_by_key(values: Float[Tensor, "b v"], count: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """The same without waiting for the device: numbers of 64 bits, the value (not negative) above, the id below."""
    vocabulary = values.shape[-1]
    below = torch.arange(vocabulary - 1, -1, -1, device=values.device)
    # The bits of floats that are not negative are ordered as the floats are.
    key = (values.float().view(torch.int32).long() << 32) | below
    token = vocabulary - 1 - (key.topk(count).values & (2**32 - 1))
    return values.gather(1, token), token


def pick(weight: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse CDF: the first entry at which the running share exceeds the number; never one of weight 0."""
    running = weight.cumsum(-1)
    index = (running <= uniform[:, None] * running[:, -1:]).sum(-1)
    last = (weight > 0).long().mul(torch.arange(1, weight.shape[-1] + 1, device=weight.device)).amax(-1) - 1
    return torch.minimum(index, last)


def draw(
    logits: Float[Tensor, "b v"],
    recent: Int[Tensor, "b window"],
    uniform: Float[Tensor, "b 2"],
    sampling: Sampling,
) -> Int[Tensor, " b"]:
    """Draw one token per utterance.

    Args:
        logits: scores, −inf at what may not be drawn.
        recent: the last tokens of each utterance, −1 where there are none yet.
        uniform: two numbers in [0, 1) per utterance: for the draw and for a second draw.
        sampling: how.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    probability = logits.softmax(-1)
    kept, order = nucleus(probability, sampling)
    token = order.gather(1, pick(kept, uniform[:, 0])[:, None])[:, 0]
    if not sampling.repetition_window:
        return token
    repeats = (recent == token[:, None]).sum(-1)
    again = repeats >= sampling.repetition_window * sampling.repetition_share
    if logits.device.type == "cpu":  # where to look costs nothing, only the rows that need it are drawn again
        rows = again.nonzero()[:, 0]
        if len(rows):
            token[rows] = _other(probability[rows], token[rows], uniform[rows, 1])
        return token
    return torch.where(again, _other(probability, token, uniform[:, 1]), token)


def _other(
    probability: Float[Tensor, "b v"], token: Int[Tensor, " b"], uniform: Float[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """A draw from everything but the token; the token itself where there is nothing else."""
    others = probability.scatter(1, token[:, None], 0.0)
    return torch.where(others.sum(-1) > 0, pick(others, uniform), token)
