# SPDX-License-Identifier: Apache-2.0
"""Test sets by name and path."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tts_align.data.words import LANGUAGES
from tts_align.evaluation.suites.base import Suite, SuiteItem
from tts_align.evaluation.suites.cv3 import read_cv3
from tts_align.evaluation.suites.jkyb import read_jkyb
from tts_align.evaluation.suites.own import read_rows, read_sentences
from tts_align.evaluation.suites.seed import read_seed
from tts_align.evaluation.suites.words import read_words
from tts_align.utils.assets import resolve

__all__ = ["SUITES", "Suite", "SuiteItem", "read_suite"]


def _words(path: Path, language: str, known: str) -> Suite:
    if language not in ("", known):
        raise ValueError(f"words-{known} is in {known}, got the language {language!r}: leave it out")
    return read_words(path, known)


SUITES: dict[str, Callable[[Path, str], Suite]] = {
    "sentences": read_sentences,
    "manifest": read_rows,
    "seed": read_seed,
    "cv3": read_cv3,
    "jkyb": read_jkyb,
    **{f"words-{language}": partial(_words, known=language) for language in LANGUAGES},
}
"""Readers by the name that a recipe or option gives."""


def read_suite(name: str, path: str | Path, language: str = "") -> Suite:
    """Read a test set.

    Args:
        name: its kind: sentences, manifest, seed, cv3, jkyb, or words-ja, words-zh, words-en.
        path: of its file or folder; ``demo:`` names an embedded file; of words-ja the split, such as test_words.
        language: of the sentences, where the test set does not say it.

    Raises:
        ValueError: there is no such kind; or with file and line of every fault, twenty at most.
    """
    if name not in SUITES:
        near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(name, SUITES, 1))
        raise ValueError(f"unknown test set {name!r}: expected one of {', '.join(SUITES)}{near}")
    found = SUITES[name](Path(resolve(path)), language)
    return Suite(found.name, str(path), found.items, found.protocol)
