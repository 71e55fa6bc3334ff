# SPDX-License-Identifier: Apache-2.0
"""Long texts as the CosyVoice runtime speaks them: cleaned, numbers written out, and cut at the ends of sentences.

The rules are those of the runtime's ``text_normalize`` and ``split_paragraph``; the tests compare with what these give.
A text with any Chinese character, a Japanese one too, goes the Chinese way, every other the English way.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

FrontEnd = Literal["whole", "split", "normalise"]
_LONGEST, _LONG_ENOUGH, _TOO_SHORT = 80, 60, 20
"""A piece is closed before it gets longer than the first, if it is longer than the second; a last one shorter than the
third joins the one before."""
_STOPS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}
_QUOTES = '"\N{RIGHT DOUBLE QUOTATION MARK}'
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_DROPPED = dict.fromkeys(map(ord, "（）【】`"))


def spoken_pieces(text: str, count_tokens: Callable[[str], int], front_end: FrontEnd) -> tuple[str, ...]:
    """What is spoken of a text, piece by piece.

    Args:
        text: as written; one that holds ``<|`` and ``|>`` is left as it is.
        count_tokens: length of a text that is not Chinese.
        front_end: whole leaves every text as it is; split cuts a text that the runtime would cut and leaves others as
            they are; normalise does all that the runtime does, with its libraries for numbers and units.

    Raises:
        ModuleNotFoundError: ``normalise`` needs a library that is not installed; the message says which.
    """
    if front_end == "whole" or not text.strip() or ("<|" in text and "|>" in text):
        return (text,)
    chinese = bool(_CHINESE.search(text))
    plain = text.strip()
    if front_end == "normalise":
        plain = _normaliser(chinese)(plain)
    if chinese:
        plain = _clean_chinese(plain)
    elif front_end == "normalise":
        plain = _spell_numbers(plain)
    pieces = _split(plain, len if chinese else count_tokens, _STOPS["zh" if chinese else "en"])
    found = tuple(piece for piece in pieces if not _is_punctuation(piece))
    if not found or (front_end == "split" and len(found) == 1):
        return (text,)
    return found


def _clean_chinese(text: str) -> str:
    text = text.replace("\n", "")
    kept = "".join(char for place, char in enumerate(text) if char != " " or _between_ascii(text, place))
    for old, new in (("²", "平方"), ("³", "立方"), (".", "。"), (" - ", "，")):
        kept = kept.replace(old, new)
    kept = kept.translate(_DROPPED).replace("——", " ")
    return re.sub(r"[，,、]+$", "。", kept)


def _between_ascii(text: str, place: int) -> bool:
    """Whether a blank stands between two letters or signs of ASCII, where it divides words."""
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    return len(around) == 2 and around.isascii() and " " not in around


def _split(text: str, length: Callable[[str], int], stops: str) -> list[str]:
    """Cut behind stops, and join what is short; a text without a final stop gets one."""
    if text and text[-1] not in stops:
        text += "。" if "。" in stops else "."
    sentences: list[str] = []
    start = 0
    for place, char in enumerate(text):
        if char not in stops:
            continue
        end = place + 1
        if start < place:
            sentences.append(text[start:end])
        if text[end : end + 1] in tuple(_QUOTES) and sentences:
            sentences[-1] += text[end]
            end += 1
        start = end
    pieces: list[str] = []
    current = ""
    for sentence in sentences:
        if length(current + sentence) > _LONGEST and length(current) > _LONG_ENOUGH:
            pieces.append(current)
            current = ""
        current += sentence
    if current and pieces and length(current) < _TOO_SHORT:
        pieces[-1] += current
    elif current:
        pieces.append(current)
    return pieces


def _is_punctuation(text: str) -> bool:
    return all(unicodedata.category(char)[0] in "PS" for char in text)


def _spell_numbers(text: str) -> str:
    """Digits as English words, as the runtime writes them behind its normaliser."""
    engine = _library("inflect").engine()
    return re.sub(r"\d+", lambda found: str(engine.number_to_words(found[0])), text)


@lru_cache(maxsize=2)
def _normaliser(chinese: bool) -> Callable[[str], str]:
    """The runtime's own: WeTextProcessing's rules, as the package ``wetext`` runs them."""
    kind = _library("wetext").Normalizer
    made = kind(remove_erhua=False) if chinese else kind()
    normalise: Callable[[str], str] = made.normalize
    return normalise


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"front_end: normalise writes numbers and units out as the CosyVoice runtime does and needs {name}: "
            "pip install 'tts-align[normalise]', or set front_end: split",
            name=name,
        ) from None
