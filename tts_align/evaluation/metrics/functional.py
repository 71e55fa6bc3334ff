# SPDX-License-Identifier: Apache-2.0
"""Error counts: pure functions of strings."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from kaldialign import edit_distance

BAD_CER = 0.3
"""An utterance with a higher character error rate is a bad case."""


def normalise(text: str) -> str:
    """What characters are counted: NFKC, lower case, without punctuation, symbols and spaces.

    Example:
        >>> normalise("カレーは、とても ﾂﾗｲ！")
        'カレーはとてもツライ'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if unicodedata.category(character)[0] not in "PSZC")


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Fewest edits that turn the reference into the hypothesis, and the reference's length, in normalised characters.

    Example:
        >>> character_errors("なべわからい", "なべつらい、よ")
        (3, 6)
    """
    expected, heard = normalise(reference), normalise(hypothesis)
    return edits(expected, heard), len(expected)


def edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other.

    Example:
        >>> edits("からい", "つらいよ")
        2
    """
    counts: dict[str, Any] = edit_distance(list(reference), list(hypothesis))
    return int(counts["total"])


def cer(reference: str, hypothesis: str) -> float:
    """Character error rate of one utterance: edits over the reference's length; may exceed 1.

    Example:
        >>> cer("かな", "かに")
        0.5
    """
    errors, length = character_errors(reference, hypothesis)
    return errors / max(length, 1)


def error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Edits over the reference's length, in whatever both are sequences of: characters, words, phonemes.

    Example:
        >>> error_rate("R EH1 D".split(), "R IY1 D".split())
        0.3333333333333333
    """
    return edits(reference, hypothesis) / max(1, len(reference))


def nearest_cer(references: Sequence[str], hypothesis: str) -> float:
    """Character error rate against the nearest of several references."""
    if not references:
        raise ValueError("expected at least one transcript to compare with, got none")
    return min(cer(reference, hypothesis) for reference in references)
