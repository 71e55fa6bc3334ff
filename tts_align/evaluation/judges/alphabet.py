# SPDX-License-Identifier: Apache-2.0
"""What a CTC model of transformers writes: the tokens of its vocabulary, and texts spelled with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tts_align.evaluation.readings.japanese import hiragana, katakana
from tts_align.evaluation.readings.spelling import Script
from tts_align.utils.readers import ReadError, read_json_object

_SPECIAL = re.compile(r"<.*>|\[(PAD|UNK|CLS|SEP|MASK)\]")
_PINYIN = re.compile(r"[bpmfdtnlgkhjqxzcsryw]?h?[aeiouvü]+(n|ng|r)?[1-5]")
_INITIAL = re.compile(r"zh|ch|sh|[bpmfdtnlgkhjqxzcsryw]")
_ENOUGH = 20
"""Pinyin syllables or phonemes in a vocabulary that writes them."""
ARPABET = {
    "AA": "ɑː ɑ", "AE": "æ", "AH": "ʌ ə ɐ", "AO": "ɔː ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "tʃ", "D": "d",
    "DH": "ð", "EH": "ɛ e", "ER": "ɜː ɝ ɚ ɜ", "EY": "eɪ", "F": "f", "G": "ɡ g", "HH": "h", "IH": "ɪ", "IY": "iː i",
    "JH": "dʒ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ", "OW": "oʊ əʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ r",
    "S": "s", "SH": "ʃ", "T": "t", "TH": "θ", "UH": "ʊ", "UW": "uː u", "V": "v", "W": "w", "Y": "j", "Z": "z",
    "ZH": "ʒ",
}  # fmt: skip
"""ARPAbet phoneme -> the same in IPA, the commonest way to write it first."""
_UNSTRESSED = {"AH": "ə ɐ ʌ", "ER": "ɚ ɜː ɝ ɜ", "IY": "i iː"}


@dataclass(frozen=True)
class Alphabet:
    """Tokens of a CTC model.

    Args:
        ids: token -> number, without special tokens.
        blank: number of the blank.
        space: token between words; empty if there is none.
        script: what the tokens write.
    """

    ids: Mapping[str, int]
    blank: int
    space: str
    script: Script

    def spell(self, text: str) -> tuple[list[str], list[str]]:
        """A text in tokens, and the letters in it that no token writes; punctuation is left out silently.

        Args:
            text: in the alphabet's script; phonemes in ARPAbet, pinyin with numbers.
        """
        if self.script is Script.PHONEMES:
            parts = [self._phoneme(one) for one in text.split() if one != "|"]  # a bar between words
        elif self.script is Script.PINYIN:
            parts = [self._syllable(one) for one in text.split()]
        else:
            parts = [self._letters(text)]
        tokens = [token for part, _ in parts for token in part]
        return tokens, [letter for _, unknown in parts for letter in unknown]

    def text(self, numbers: Sequence[int]) -> str:
        """What tokens write; phonemes and syllables with spaces between them."""
        names = {number: token for token, number in self.ids.items()}
        tokens = [names[number] for number in numbers if number in names]
        if self.script in (Script.PHONEMES, Script.PINYIN):
            return " ".join(token for token in tokens if token != self.space)
        return "".join(" " if token == self.space else token for token in tokens).strip()

    def _letters(self, text: str) -> tuple[list[str], list[str]]:
        """Greedily the longest token at each place, in whatever case or kana the vocabulary has it."""
        tokens, unknown, place = [], [], 0
        text = " ".join(unicodedata.normalize("NFKC", text).split())
        longest = max(map(len, self.ids), default=1)
        while place < len(text):
            for length in range(min(longest, len(text) - place), 0, -1):
                token = self._known(text[place : place + length])
                if token:
                    tokens.append(token)
                    place += length
                    break
            else:
                if text[place] == " " and self.space:
                    tokens.append(self.space)
                elif unicodedata.category(text[place])[0] in "LN":
                    unknown.append(text[place])
                place += 1
        return tokens, unknown

    def _known(self, part: str) -> str:
        forms = (part, part.lower(), part.upper(), hiragana(part), katakana(part))
        return next((form for form in forms if form in self.ids and form != self.space), "")

    def _phoneme(self, phoneme: str) -> tuple[list[str], list[str]]:
        """A phoneme as the vocabulary writes it: with its stress, without, or in IPA."""
        plain = phoneme.rstrip("012")
        for form in (phoneme, phoneme.lower(), plain, plain.lower()):
            if form in self.ids:
                return [form], []
        unstressed = phoneme.endswith("0")
        forms = (_UNSTRESSED if unstressed else {}).get(plain, ARPABET.get(plain, "")).split()
        for form in forms:
            if form in self.ids:
                return [form], []
        for form in forms or [phoneme]:
            tokens, unknown = self._letters(form)
            if tokens and not unknown:
                return tokens, []
        return [], [phoneme]

    def _syllable(self, syllable: str) -> tuple[list[str], list[str]]:
        """A syllable as the vocabulary writes it: whole, without its tone, as initial and final, or in letters."""
        toneless = [] if syllable[-1:] in self.ids else [syllable.rstrip("12345")]
        for form in (syllable, syllable.replace("v", "ü"), *toneless):
            if form in self.ids:
                return [form], []
        initial = _INITIAL.match(syllable)
        if initial and initial[0] in self.ids:
            rest = slice(initial.end(), None)
            for form in (syllable[rest], syllable[rest].replace("v", "ü"), *(one[rest] for one in toneless)):
                if form in self.ids:
                    return [initial[0], form], []
        tokens, unknown = self._letters(syllable)
        return tokens, unknown and [syllable]


def read_alphabet(folder: Path, blank: int, target_language: str = "", script: Script | None = None) -> Alphabet:
    """Read the vocabulary beside a CTC model.

    Args:
        folder: of the model: `vocab.json`, and `tokenizer_config.json` if it is there.
        blank: number of the blank.
        target_language: key of a vocabulary of several languages, as MMS has it.
        script: what it writes; found out from its tokens by default.

    Raises:
        ValueError: the vocabulary is of several languages, and none of them was named; or it is no vocabulary.
    """
    path: str | Path = folder / "vocab.json"
    vocabulary = read_json_object(path)
    if any(isinstance(value, dict) for value in vocabulary.values()):
        if target_language not in vocabulary:
            known = ", ".join(sorted(vocabulary)[:20])
            raise ValueError(
                f"{path} holds the letters of several languages: expected "
                f"model.judge.init_args.target_language to be one of {known}, got {target_language!r}"
            )
        vocabulary, path = vocabulary[target_language], f"{path}: {target_language}"
    if not isinstance(vocabulary, dict):
        raise ReadError(path, f"expected the number of each token, got {vocabulary!r:.60}")
    odd = next(((token, number) for token, number in vocabulary.items() if type(number) is not int), None)
    if odd is not None:
        raise ReadError(path, f"expected the number of each token, got {odd[1]!r:.60} for {odd[0]!r:.60}")
    stored = folder / "tokenizer_config.json"
    settings = read_json_object(stored) if stored.is_file() else {}
    space = str(settings.get("word_delimiter_token", "|"))
    ids = {token: number for token, number in vocabulary.items() if number != blank and not _SPECIAL.fullmatch(token)}
    return Alphabet(ids, blank, space if space in ids else " " if " " in ids else "", script or written_by(ids))


def written_by(tokens: Mapping[str, int]) -> Script:
    """What a vocabulary writes.

    >>> written_by(dict.fromkeys("あいうえおカキクケコ", 0))
    <Script.KANA: 'kana'>
    """
    if sum(token.rstrip("012") in ARPABET and token.isupper() for token in tokens if len(token) > 1) >= _ENOUGH:
        return Script.PHONEMES
    if sum(token in tokens for token in ("ə", "ɪ", "ʃ", "ŋ", "ɹ", "ʊ", "θ", "ɛ", "ʒ")) >= 5:
        return Script.PHONEMES
    if sum(bool(_PINYIN.fullmatch(token)) for token in tokens) >= _ENOUGH:
        return Script.PINYIN
    letters = [token for token in tokens if len(token) == 1 and unicodedata.category(token) == "Lo"]
    kana = [letter for letter in letters if "ぁ" <= letter <= "ヺ"]
    return Script.KANA if kana and len(kana) == len(letters) else Script.WRITTEN
