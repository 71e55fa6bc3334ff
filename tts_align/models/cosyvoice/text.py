# SPDX-License-Identifier: Apache-2.0
"""Words to token ids: the Qwen2 tokenizer with CosyVoice's own tokens behind it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tts_align.models.base.layout import Family

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_PROMPT = "<|endofprompt|>"
"""Closes an instruction."""

_EVENTS = (
    "<|im_start|> <|im_end|> <|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] [clucking] [accent]"
    " [quick_breath] <laughter> </laughter> [hissing] [sigh] [vocalized-noise] [lipsmack] [mn]"
)
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
_INITIALS = "b c ch d f g h j k l m n p q r s sh t w x y z zh"
_FINALS = {
    "01234": "a ai an ang ao e ei en eng i ian in ing iu o ong ou u uang ue un uo",
    "1234": "ia iang iao ie iong ua uai uan ui",
    "234": "er ü",
    "4": "ve",
}
"""Pinyin finals by the tones they occur with; 0 is none."""
_TONE_MARKS = {
    "0": "",
    "1": "\N{COMBINING MACRON}",
    "2": "\N{COMBINING ACUTE ACCENT}",
    "3": "\N{COMBINING CARON}",
    "4": "\N{COMBINING GRAVE ACCENT}",
}


def special_tokens(family: Family) -> tuple[str, ...]:
    """The tokens that are added to the text tokenizer, in the order of their ids.

    The first two are in the tokenizer already. Version 3 has phonemes besides: those of the CMU dictionary, vowels
    without and with stress 0 to 2, and pinyin initials and finals with their tones.
    """
    if family == "cosyvoice2":
        return tuple(_EVENTS.split())
    vowels = [vowel + stress for vowel in _VOWELS.split() for stress in ("", "0", "1", "2")]
    finals = [_marked(final, tone) for tones, some in _FINALS.items() for final in some.split() for tone in tones]
    phonemes = sorted([*vowels, *_CONSONANTS.split(), *_INITIALS.split(), *finals])
    return (*_EVENTS.split(), "<|endofsystem|>", *(f"[{phoneme}]" for phoneme in phonemes))


def _marked(final: str, tone: str) -> str:
    """A pinyin final with its tone mark where it belongs: on a, e, the o of ou, or else the last vowel."""
    at = next((final.index(part) for part in ("a", "e", "ou") if part in final), -1)
    if at < 0:
        at = max(final.rfind(vowel) for vowel in "iouü")
    return unicodedata.normalize("NFC", final[: at + 1] + _TONE_MARKS[tone] + final[at + 1 :])


class TextTokenizer:
    """The tokenizer of CosyVoice2 or Fun-CosyVoice3; adds neither a first nor a last token.

    Args:
        directory: of the text model, with ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.
        family: decides which tokens are added.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged.
    """

    def __init__(self, directory: str | Path, family: Family) -> None:
        self.special = special_tokens(family)
        self._tokenizer = _loaded(Path(directory), family)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; added tokens in it, such as ``[breath]``, are one id each."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, added tokens included."""
        added = self._tokenizer.get_added_tokens_decoder()
        parts = []
        for apart, group in groupby(
            ids, key=added.__contains__
        ):  # the letters of an added token are no bytes in disguise
            some = list(group)
            parts += [added[one].content for one in some] if apart else [self._tokenizer.decode(some)]
        return "".join(parts)

    def id(self, token: str) -> int:
        """Id of one token.

        Raises:
            ValueError: there is no such token.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the text tokenizer has no token {token!r}")
        return found

    @property
    def length(self) -> int:
        """How many ids there are, added tokens included; the text embedding has at least as many rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)


@lru_cache(maxsize=4)
def _loaded(directory: Path, family: Family) -> Tokenizer:
    """Read once, as it takes a moment; nothing changes it afterwards."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"no {directory / name}: expected the tokenizer files of the text model")
    from transformers import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the library beneath raises no narrower one
        raise ValueError(f"cannot read the text tokenizer in {directory}: {error}") from None
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.add_tokens(list(special_tokens(family)), special_tokens=True)
    return tokenizer.backend_tokenizer
