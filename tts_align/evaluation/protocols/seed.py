# SPDX-License-Identifier: Apache-2.0
"""The rules of Seed-TTS-Eval (arXiv 2406.02430) and of CV3-Eval (arXiv 2505.17589), character for character."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tts_align.evaluation.protocols.base import Protocol, primary
from tts_align.evaluation.protocols.chinese import converter, simplified

HANZI_PUNCTUATION = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
"""The 82 characters of ``zhon.hanzi.punctuation``."""
_DELETED = str.maketrans("", "", (HANZI_PUNCTUATION + string.punctuation).replace("'", ""))


def without_punctuation(text: str) -> str:
    """Punctuation deleted, not replaced by a space, the apostrophe kept; then each pair of spaces is one space, once.

    >>> without_punctuation("well-known,  isn't   it?")
    "wellknown isn't  it"
    """
    return text.translate(_DELETED).replace("  ", " ")


class Seed(Protocol):
    """Word error rate of English, character error rate of Chinese; the mean over utterances.

    Numbers and abbreviations are not normalised: "fifty" for "50" is an error, as in the published numbers. Chinese is
    split into characters, so Latin letters are counted one by one, and their case matters. Transcripts in Chinese are
    simplified first; references are taken as they are.
    """

    name = "seed"
    knows: frozenset[str] | None = frozenset({"en", "zh"})
    by_character: frozenset[str] = frozenset({"zh"})

    def normalise(self, text: str, language: str = "") -> str:
        """See :func:`without_punctuation`; words in lower case, or characters with a space between them."""
        bare = without_punctuation(text)
        return " ".join(bare) if primary(language) in self.by_character else bare.lower()

    def normalise_transcript(self, text: str, language: str = "") -> str:
        """The same, Chinese simplified first."""
        return self.normalise(simplified(text) if primary(language) == "zh" else text, language)

    def check(self, languages: Iterable[str]) -> None:
        """Chinese needs OpenCC."""
        wanted = {primary(language) for language in languages}
        if self.knows is not None and (unknown := sorted(wanted - self.knows)):
            raise ValueError(
                f"protocol {self.name} has rules for {', '.join(sorted(self.knows))} only, got sentences of language "
                f"{unknown[0] or '(none given)'}: name another protocol, or the language"
            )
        if "zh" in wanted:
            converter()


class CV3(Seed):
    """The same rules for every language: characters for Chinese, Japanese and Korean, words for all others.

    Kana and kanji are not folded into one another: a word written otherwise is an error.
    """

    name = "cv3"
    knows = None
    by_character = frozenset({"zh", "ja", "ko"})
