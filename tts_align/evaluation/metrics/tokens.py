# SPDX-License-Identifier: Apache-2.0
"""How much of a codebook is used, and how much a token tells about the next.

A tokenizer that is trained further may stop using its tokens, or repeat itself; entropy H(X) and mutual information
I(X_{n+1}; X_n) show it. Both are estimated from counts. The plug-in estimators put shares where probabilities belong,
which makes entropies too low, and the mutual information too high; the Miller-Madow correction makes up for the first
order of that. With a codebook of thousands pairs are sparse: compare only counts of about as many tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tts_align.batch import Record
from tts_align.utils.distributed import gathered


def entropy_bits(counts: Int[Tensor, " k"], miller_madow: bool = False) -> Float[Tensor, ""]:
    """Entropy of what was counted: the sum of -p log2(p) over shares p; NaN if nothing was.

    Args:
        counts: How often each outcome occurred.
        miller_madow: Add (outcomes that occurred - 1) / (2 n ln 2) for n observations.

    >>> entropy_bits(torch.tensor([2, 1, 1, 0])).item()
    1.5
    """
    total = counts.sum()
    bits = torch.special.entr(counts.double() / total).sum() / math.log(2)
    plug_in = torch.where(total > 0, bits, math.nan)  # the sum over no outcomes at all would be 0
    return plug_in + _missing_bits(counts) if miller_madow else plug_in


def mutual_information_bits(
    first: Int[Tensor, " k"], second: Int[Tensor, " k"], counts: Int[Tensor, " k"], miller_madow: bool = False
) -> Float[Tensor, ""]:
    """What the first of a pair tells about the second: H(first) + H(second) - H(pair); NaN without pairs.

    Args:
        first: First outcome of each different pair.
        second: Its second outcome.
        counts: How often it occurred.
        miller_madow: Correct the three entropies; the result may then be below 0.

    >>> first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    >>> mutual_information_bits(first, second, torch.tensor([5, 5])).item()
    1.0
    """
    before, after = (_summed(outcomes, counts) for outcomes in (first, second))
    marginal = entropy_bits(before, miller_madow) + entropy_bits(after, miller_madow)
    information = marginal - entropy_bits(counts, miller_madow)
    return information if miller_madow else information.clamp_min(0)


def used_share(counts: Int[Tensor, " v"]) -> Float[Tensor, ""]:
    """Share of the codebook that occurred at all.

    >>> used_share(torch.tensor([2, 1, 1, 0])).item()
    0.75
    """
    return (counts > 0).double().mean()


def _missing_bits(counts: Int[Tensor, " k"]) -> Float[Tensor, ""]:
    return ((counts > 0).sum() - 1) / (2 * math.log(2) * counts.sum().double())


def _summed(outcomes: Int[Tensor, " k"], counts: Int[Tensor, " k"]) -> Int[Tensor, " u"]:
    """Counts of each different outcome."""
    different, place = outcomes.unique(return_inverse=True)
    return counts.new_zeros(len(different)).index_add_(0, place, counts)


@dataclass(frozen=True)
class TokenCounts(Record):
    """How often each token and each pair of neighbours occurred: adds up over batches and processes.

    Args:
        tokens: Occurrences of each of the v speech tokens.
        pairs: Different pairs that occurred, ascending; the first token times v plus the second.
        pair_counts: Occurrences of each of them.
    """

    tokens: Int[Tensor, " v"]
    pairs: Int[Tensor, " k"]
    pair_counts: Int[Tensor, " k"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "b s"], mask: Bool[Tensor, "b s"], codebook_size: int) -> TokenCounts:
        """Count a padded batch; waits for the GPU.

        Args:
            tokens: Speech tokens of each utterance.
            mask: True at real tokens; neighbours are pairs where both are.
            codebook_size: Size of the codebook.

        Raises:
            ValueError: A real token is no token.
        """
        real = tokens[mask].long()
        if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < codebook_size:
            raise ValueError(
                f"expected speech tokens from 0 to {codebook_size - 1}, got {int(real.min())} to {int(real.max())}: "
                "leave special tokens out of the mask"
            )
        pairs = (tokens[:, :-1].long() * codebook_size + tokens[:, 1:])[mask[:, :-1] & mask[:, 1:]]
        return cls(torch.bincount(real, minlength=codebook_size), *pairs.unique(return_counts=True))

    @classmethod
    def none(cls, codebook_size: int) -> TokenCounts:
        """What nothing counts to, to add to.

        Args:
            codebook_size: Size of the codebook.
        """
        empty = torch.zeros(0, dtype=torch.long)
        return cls(torch.zeros(codebook_size, dtype=torch.long), empty, empty)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        if len(self.tokens) != len(other.tokens):
            raise ValueError(
                f"expected counts of one codebook, got {len(self.tokens)} and {len(other.tokens)} speech tokens"
            )
        other = other.to(self.tokens.device)
        pairs, place = torch.cat([self.pairs, other.pairs]).unique(return_inverse=True)
        counts = torch.cat([self.pair_counts, other.pair_counts])
        summed = counts.new_zeros(len(pairs)).index_add_(0, place, counts)
        return TokenCounts(self.tokens + other.tokens, pairs, summed)

    def across_ranks(self) -> TokenCounts:
        """The sum over all processes, the same in each; itself if there is one only."""
        parts = gathered(self.to("cpu"))
        if len(parts) == 1:
            return self
        total = TokenCounts.none(len(self.tokens))
        for part in parts:
            total += part
        return total.to(self.tokens.device)

    def entropy_bits(self, miller_madow: bool = False) -> Float[Tensor, ""]:
        """Entropy H(X) of a token; see the function of this name."""
        return entropy_bits(self.tokens, miller_madow)

    def mutual_information_bits(self, miller_madow: bool = False) -> Float[Tensor, ""]:
        """What a token tells about the next, I(X_{n+1}; X_n); see the function of this name."""
        codebook_size = len(self.tokens)
        return mutual_information_bits(
            self.pairs // codebook_size, self.pairs % codebook_size, self.pair_counts, miller_madow
        )

    def used_share(self) -> Float[Tensor, ""]:
        """Share of the codebook that occurred at all."""
        return used_share(self.tokens)
