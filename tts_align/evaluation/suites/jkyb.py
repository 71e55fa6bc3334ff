# SPDX-License-Identifier: Apache-2.0
"""The file of Joyo Kanji Yomi Benchmark, Parakeet edition: a sentence with one marked kanji on each line of JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tts_align.data.records import Span
from tts_align.evaluation.prompts import SentencePrompt
from tts_align.evaluation.protocols import Reference
from tts_align.evaluation.protocols.jkyb import Tagged
from tts_align.evaluation.suites.base import Faults, Suite, SuiteItem
from tts_align.utils.files import read_json_lines

_TEXTS = ("key", "text", "tagged_text", "yomi", "tagged_yomi")


def read_jkyb(path: Path, language: str = "") -> Suite:
    """Read the benchmark's file, ``common_kanji_source.jsonl``.

    Args:
        path: of the file.
        language: ja, whatever is given.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    del language
    faults = Faults(path)
    items = []
    for number, row in read_json_lines(path):
        if wrong := list(_wrong(row)):
            faults.add(number, "; ".join(wrong))
        elif faults.check_id(number, row["key"]):
            items.append(_item(row, f"{path}:{number}"))
    faults.finish(items)
    return Suite("jkyb", str(path), tuple(items), "jkyb")


def _wrong(row: Mapping[str, Any]) -> Iterator[str]:
    lacking = [name for name in _TEXTS if not isinstance(row.get(name), str) or not row[name]]
    readings = row.get("readings")
    if lacking:
        yield f"{', '.join(lacking)} must be text that is not empty"
    if not isinstance(readings, Mapping):
        yield "readings must hold natural and marginal"
        return
    natural, marginal = (readings.get(name, []) for name in ("natural", "marginal"))
    for name, some in (("natural", natural), ("marginal", marginal)):
        if not isinstance(some, list) or not all(isinstance(one, str) and one for one in some):
            yield f"readings.{name} must be a list of readings"
            return
    if not natural:
        yield "readings.natural must not be empty"
    if both := sorted(set(natural) & set(marginal)):
        yield f"reading {both[0]!r} is both natural and marginal"
    for tagged, whole in () if lacking else (("tagged_text", "text"), ("tagged_yomi", "yomi")):
        try:
            parts = Tagged.parse(row[tagged])
        except ValueError as error:
            yield f"{tagged}: {error}"
            continue
        if parts.before + parts.target + parts.after != row[whole]:
            yield f"{tagged} without its tags is not {whole}"


def _item(row: Mapping[str, Any], where: str) -> SuiteItem:
    natural, marginal = (tuple(row["readings"].get(name, ())) for name in ("natural", "marginal"))
    text, reading = Tagged.parse(row["tagged_text"]), Tagged.parse(row["tagged_yomi"])
    span = Span(len(text.before), len(text.before) + len(text.target), natural, marginal)
    transcripts = {one: f"{reading.before}{one}{reading.after}" for one in (*natural, *marginal)}
    sentence = SentencePrompt(row["key"], row["text"], "ja", spans=(span,), transcripts=transcripts, right=natural)
    reference = Reference(row["text"], "ja", row["yomi"], row["tagged_yomi"], natural, marginal)
    return SuiteItem(sentence, reference, where=where)
