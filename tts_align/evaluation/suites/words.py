# SPDX-License-Identifier: Apache-2.0
"""The package's benchmark of ambiguous words as a test set: ``words-ja``, ``words-zh``, ``words-en``."""

from __future__ import annotations

from pathlib import Path

from tts_align.data.words import PREFIX, SPLITS, MarkedSentence, load
from tts_align.evaluation.prompts import read_prompts
from tts_align.evaluation.protocols import Reference
from tts_align.evaluation.suites.base import Suite, SuiteItem

ALL = "all"


def read_words(path: str | Path, language: str) -> Suite:
    """Read a split of the benchmark; see :mod:`tts_align.data.words`.

    Args:
        path: name of the split: train, dev, test_sentences, test_words, or all.
        language: ja, zh or en.

    Raises:
        ValueError: there is no such split.
    """
    split = str(path)
    if split not in (ALL, *SPLITS):
        raise ValueError(
            f"words-{language}: expected the name of a split as its path, one of {', '.join(SPLITS)}, {ALL}"
        )
    name = f"{PREFIX}{language}" if split == ALL else f"{PREFIX}{language}/{split}"
    references = (_reference(one) for one in load(language, None if split == ALL else split))
    items = tuple(
        SuiteItem(prompt, reference, where=name)
        for prompt, reference in zip(read_prompts(name), references, strict=True)
    )
    return Suite(f"words-{language}", name, items, "cv3")


def _reference(one: MarkedSentence) -> Reference:
    start, end = one.spoken_span
    tagged = f"{one.spoken[:start]}<{one.spoken[start:end]}>{one.spoken[end:]}"
    return Reference(one.text, one.language, one.spoken, tagged, one.span.right)
