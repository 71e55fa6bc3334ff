# SPDX-License-Identifier: Apache-2.0
"""Words that this project has replaced by plainer ones, and where each is still right."""

import re
from collections.abc import Iterator

import pytest
from places import ROOT

WORDS = {
    r"so many": "a number by its argument's name: ``count``, ``every_steps``",
    r"\bgo(es|ing)? on\b": "continues, resumes",
    r"\bverbs?\b": "command",
    r"\bfolded\b": "merged, of weights",
    r"_hearer\b": "_trained_tokenizer",
    r"nothing to hear recordings": "no tokenizer for recordings",
    r"class Heard\b|^Heard = ": "a name of its own that says what was heard",
}
"""What is not written, and what is instead."""
RIGHT = {
    r"\bverbs?\b": ("tts_align/data/words/README.md",),  # of a language
    r"\bfolded\b": ("tts_align/evaluation/", "tts_align/training/callbacks/romaji.py"),  # spellings, by Unicode
}
"""Beginnings of the paths in which a word is the right one."""


def lines() -> Iterator[tuple[str, int, str]]:
    """Path, number and text of every line that a user or developer reads."""
    paths = [path for folder in ("tts_align", "recipes") for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in (".py", ".yaml", ".md")]
    for path in [*paths, ROOT / "README.md", ROOT / "benchmarks/README.md"]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            yield str(path.relative_to(ROOT)), number, line


@pytest.mark.parametrize("word", WORDS)
def test_a_word_has_been_replaced(word: str):
    right = RIGHT.get(word, ())
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, number, line in lines()
        if re.search(word, line, re.IGNORECASE) and not path.startswith(right)
    ]
    assert not found, f"write instead: {WORDS[word]}\n" + "\n".join(found)
