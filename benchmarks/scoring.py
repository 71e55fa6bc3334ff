# SPDX-License-Identifier: Apache-2.0
"""Scoring 2,000 pairs of texts with each protocol against jiwer, in one process; results in results/scoring.json.

    python benchmarks/scoring.py

Ours is everything from two raw texts to the rates: normalising, counting substitutions, deletions and insertions of
each utterance, and aggregating. jiwer gets all pairs in one call, which is its fastest way, and is charged for nothing
else; only where the normaliser is a library's own (Whisper's, and pypinyin, which reads characters), both are given the
same one. Protocol jkyb also looks for a marked word in every transcript, which jiwer has no word for, in the same time.
Seconds are of the process, so that others on the machine do not count. Rounds alternate; the ratio is that of the
medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jiwer
import numpy as np
from machine import machine, save

from tts_align.evaluation.protocols import Protocol, Reference, find_protocol

PAIRS, WORDS, ROUNDS = 2000, 20, 15
LIMIT = 1.5
LETTERS = {"en": "abcdefghijklmnop", "zh": "天地玄黄宇宙洪荒日月盈昃辰宿列张", "ja": "アカサタナハマヤラワンガザダバパ"}
CASES = (
    ("seed", "en"),
    ("seed", "zh"),
    ("cv3", "en"),
    ("cv3", "ja"),
    ("whisper", "en"),
    ("kana", "ja"),
    ("pinyin", "zh"),
    ("jkyb", "ja"),
)


def make_pairs(language: str, pairs: int = PAIRS, words: int = WORDS, seed: int = 0) -> list[tuple[str, str]]:
    """Random sentences, and the same with a tenth of their units changed, dropped or doubled."""
    random = np.random.default_rng(seed)
    letters = LETTERS[language]
    units = ["".join(random.choice(list(letters), 5)) for _ in range(500)] if language == "en" else list(letters)
    joint, end = (" ", ".") if language == "en" else ("", "。")
    found = []
    for _ in range(pairs):
        said = list(random.choice(units, words))
        heard = [
            other
            for unit in said
            for other in ([unit], [], [unit, unit], [str(random.choice(units))])[
                random.choice(4, p=(0.9, 0.03, 0.03, 0.04))
            ]
        ]
        found.append((joint.join(said) + end, joint.join(heard) + end))
    return found


def ours(protocol: Protocol, references: Sequence[Reference], heard: Sequence[str]) -> int:
    """All errors, by way of the rates."""
    counts = [protocol.score(reference, text).counts for reference, text in zip(references, heard, strict=True)]
    rates = protocol.aggregate(counts)
    return rates.substitutions + rates.deletions + rates.insertions


def theirs(protocol: Protocol, language: str, said: Sequence[str], heard: Sequence[str]) -> int:
    """All errors by jiwer."""
    if protocol.name in ("whisper", "pinyin"):
        said, heard = ([protocol.normalise(text, language) for text in texts] for texts in (said, heard))
    process = jiwer.process_words if language == "en" or protocol.name == "pinyin" else jiwer.process_characters
    out = process(list(said), list(heard))
    return out.substitutions + out.deletions + out.insertions


def reference_of(text: str, language: str, place: int) -> Reference:
    """A reference with one character marked, another one for each place; its text ends with a mark of punctuation."""
    bare, at = text[:-1], place % (len(text) - 1)
    return Reference(text, language, tagged=f"{bare[:at]}<{bare[at]}>{bare[at + 1 :]}", natural=(bare[at],))


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(name: str, language: str, pairs: int = PAIRS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times of one protocol and of jiwer, alternating; each time a new protocol, as it keeps texts."""
    texts = make_pairs(language, pairs)
    said, heard = (list(side) for side in zip(*texts, strict=True))
    references = [reference_of(text, language, place) for place, text in enumerate(said)]
    times: dict[str, list[float]] = {"ours": [], "jiwer": []}
    for _ in range(rounds):
        one, other = find_protocol(name), find_protocol(name)
        for protocol in (one, other):
            protocol.score(references[0], heard[0])  # what is loaded once is not timed
        times["ours"].append(seconds(lambda one=one: ours(one, references, heard)))
        times["jiwer"].append(seconds(lambda other=other: theirs(other, language, said, heard)))
    medians = {who: statistics.median(some) for who, some in times.items()}
    return {
        "protocol": name,
        "language": language,
        "pairs": pairs,
        "ours_seconds": round(medians["ours"], 4),
        "jiwer_seconds": round(medians["jiwer"], 4),
        "ratio": round(medians["ours"] / medians["jiwer"], 3),
    }


def main() -> None:
    """Measure, print, and save."""
    rows = [compare(name, language) for name, language in CASES]
    for row in rows:
        print(row, flush=True)
    save("scoring", {**machine(), "jiwer": version("jiwer"), "rows": rows})


if __name__ == "__main__":
    main()
