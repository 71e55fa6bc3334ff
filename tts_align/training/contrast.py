# SPDX-License-Identifier: Apache-2.0
"""The contrastive pair of token-level KTO (arXiv 2510.05799): fitted, compared, and kept as one number per token.

π⁺ is KTO on the labels, π⁻ is KTO on the flipped labels, from the same start on the same rows with the same trainer.
What is kept is log π⁺ − log π⁻ before any clamp, so μ, L and U can change without fitting again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tts_align.data.select import LabelledUtterance
from tts_align.training.cache import TokenCache
from tts_align.training.checkpoint import read_checkpoint
from tts_align.training.numbers import CHUNK_TOKENS, Numbers

SIDES = ("desirable", "undesirable")
WEIGHTS = Path("contrast", "weights.json")
"""Inside a run: which file of token weights it was trained with."""


@dataclass
class Contrast:
    """Where the token weights of TKTO come from. With nothing set ``fit`` fits the pair itself.

    Args:
        weights: file of log-ratios that an earlier run made (``cache/contrast-*.safetensors``).
        desirable: checkpoint of π⁺, a policy like this one fitted on the labels.
        undesirable: checkpoint of π⁻, a policy like this one fitted on the flipped labels.
        epochs: passes over the rows in each fit of the pair; those of the trainer by default. This and what follows is
            unused for a given pair.
        learning_rate: learning rate of the pair's fits; that of ``model.optimizer`` by default. Raise it if log-ratios
            stay near 0.
        decay_steps: optimiser steps over which that learning rate falls linearly to a twentieth; the recipe's schedule
            by default.
        sft_weight: weight of the pair's cross-entropy on the rows that count as good.
        balance: fits of the pair whose λ_U is set so that λ_D n_D / (λ_U n_U) is 4/3, as KTO's authors advise: neither,
            as in the paper; flipped, where the undesirable rows are the many; or both.
    """

    weights: str | None = None
    desirable: str | None = None
    undesirable: str | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    decay_steps: int | None = None
    sft_weight: float = 0.0
    balance: Literal["neither", "flipped", "both"] = "neither"

    def __post_init__(self) -> None:
        """Refuse half a pair, a pair beside weights, and a schedule without steps."""
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"model.contrast.decay_steps must be at least 1, got {self.decay_steps}")
        given = [name for name in SIDES if getattr(self, name) is not None]
        if len(given) == 1:
            raise ValueError(f"model.contrast names only {given[0]}: a pair needs both desirable and undesirable")
        if given and self.weights is not None:
            raise ValueError("model.contrast: desirable and undesirable have no effect beside weights; leave one out")

    @property
    def fits(self) -> bool:
        """Whether the pair has still to be fitted."""
        return self.weights is None and self.desirable is None


def undesirable_weight(labels: NDArray[np.bool_]) -> float:
    """λ_U that makes λ_D n_D / (λ_U n_U) equal to 4/3 with λ_D = 1.

    >>> undesirable_weight(np.array([True, False, False]))
    0.375
    """
    desirable = int(labels.sum())
    return 0.75 * desirable / max(len(labels) - desirable, 1)


def trained_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """Weights of the policy in a Lightning checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}: check model.contrast.desirable and .undesirable")
    state = read_checkpoint(checkpoint)["state_dict"]
    return {name.removeprefix("policy."): value for name, value in state.items() if name.startswith("policy.")}


@dataclass(frozen=True, eq=False)
class Separation:
    """How well the pair tells good tokens from bad ones, on one side of the labels.

    Args:
        target: log-ratios at the tokens that decide a reading.
        numbers: log-ratios of all tokens, by row; they stay where they are.
        keys: of the rows, as ASCII.
        deciding: index of each row's deciding token; -1 if there is none.
    """

    target: NDArray[np.float32]
    numbers: Mapping[str, Numbers]
    keys: NDArray[Any]
    deciding: NDArray[np.int32]

    @property
    def marked(self) -> list[str]:
        """Rows with a deciding token; ``target`` has the same order."""
        return [key.decode() for key in self.keys[self.deciding >= 0]]

    @property
    def elsewhere(self) -> NDArray[np.float32]:
        """Log-ratios at all other tokens, in memory."""
        return np.concatenate([np.zeros(0, np.float32), *self.pieces()])

    def pieces(self) -> Iterator[NDArray[np.float32]]:
        """The same, in pieces as large as are merged in memory (:data:`~tts_align.training.numbers.CHUNK_TOKENS`)."""
        found, count = list[Numbers](), 0
        for key, where in zip(self.keys, self.deciding, strict=True):
            values = self.numbers[key.decode()]
            found += [values] if where < 0 else [values[:where], values[where + 1 :]]
            count += len(values)
            if count >= CHUNK_TOKENS:
                yield np.concatenate(found)
                found, count = [], 0
        if found:
            yield np.concatenate(found)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Log-ratios of all tokens, piece by piece."""
        yield self.target
        yield from self.pieces()


def deciding_token(source: LabelledUtterance, count: int) -> int | None:
    """Index of the token that decides how the marked word is read, as far as the judge has located the word.

    The judge says where the word lies; its morae are taken to share that place evenly, and the first token of the first
    mora in which right and wrong reading differ decides: what follows it is no longer open, and would only dilute the
    figure. ``None`` without a marked word or without its place.

    Args:
        source: the utterance.
        count: number of its targets, end-of-speech included.
    """
    scores, spans = source.row.scores, source.row.spans
    if "target_start" not in scores or not spans or not spans[0].right or not spans[0].wrong:
        return None
    right, wrong = spans[0].right[0], spans[0].wrong[0]
    differ = (i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
    same = next(differ, min(len(right), len(wrong)))
    start, end = scores["target_start"], scores["target_end"]
    place = start + (end - start) * same / max(len(right), 1)
    return min(int(place * (count - 1) + 1e-6), count - 2)


def separation(
    cache: TokenCache, sources: Mapping[str, LabelledUtterance], partly: bool = False
) -> dict[str, Separation]:
    """Log-ratios at the deciding tokens and elsewhere, for each side of the labels.

    Args:
        cache: log-ratios of the pair.
        sources: the utterance behind each row.
        partly: whether rows without log-ratios are left out; by default they are a fault.
    """
    found: dict[str, tuple[list[bytes], list[int], list[float]]] = {side: ([], [], []) for side in SIDES}
    for key, source in sources.items():
        if partly and key not in cache.numbers:
            continue
        values = cache.numbers[key]
        keys, deciding, target = found[SIDES[0] if source.desirable else SIDES[1]]
        where = deciding_token(source, len(values))
        keys.append(key.encode())
        deciding.append(-1 if where is None else where)
        if where is not None:
            target.append(float(values[where]))
    return {
        side: Separation(np.array(target, np.float32), cache.numbers, np.array(keys, "S"), np.array(deciding, np.int32))
        for side, (keys, deciding, target) in found.items()
    }


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of numbers that are seen piece by piece.

    Args:
        count: of them.
        mean: of them.
        squares: sum of the squared distances from the mean.
        outside: how many of them reach a bound.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    outside: int = 0

    @classmethod
    def of(cls, pieces: Iterable[NDArray[np.float32]], lower: float, upper: float) -> Spread:
        """Of all pieces together."""
        found = cls()
        for piece in pieces:
            if len(piece):
                found = found + cls._of_one(piece.astype(np.float64), int(((piece <= lower) | (piece >= upper)).sum()))
        return found

    @classmethod
    def _of_one(cls, piece: NDArray[np.float64], outside: int) -> Spread:
        return cls(len(piece), float(piece.mean()), float(piece.var()) * len(piece), outside)

    def __add__(self, other: Spread) -> Spread:
        """Of the numbers of both (Chan, Golub and LeVeque, 1983)."""
        count, gap = self.count + other.count, other.mean - self.mean
        mean = self.mean + gap * other.count / max(count, 1)
        squares = self.squares + other.squares + gap**2 * self.count * other.count / max(count, 1)
        return Spread(count, mean, squares, self.outside + other.outside)

    def __str__(self) -> str:
        if not self.count:
            return "none marked"
        return f"{self.mean:+.2f} (sd {math.sqrt(self.squares / self.count):.2f})"


def describe(separations: Mapping[str, Separation], lower: float, upper: float) -> str:
    """The separation as a small table."""
    lines = [f"{'log π⁺ − log π⁻ in nats':28}{'deciding token':>22}{'elsewhere':>22}{'clamped':>10}"]
    for side, one in separations.items():
        target, elsewhere = Spread.of([one.target], lower, upper), Spread.of(one.pieces(), lower, upper)
        both = target + elsewhere
        outside = both.outside / max(both.count, 1)
        lines.append(f"{side + ' rows':28}{target!s:>22}{elsewhere!s:>22}{outside:>10.1%}")
    return "\n".join(lines)
