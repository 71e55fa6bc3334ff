# SPDX-License-Identifier: Apache-2.0
"""Test sets in our own files: lists of sentences, and manifests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tts_align.data.manifest import read_manifest
from tts_align.data.records import Row
from tts_align.evaluation.prompts import SentencePrompt, read_prompts
from tts_align.evaluation.protocols import Reference
from tts_align.evaluation.suites.base import Suite, SuiteItem, VoiceNames


def read_sentences(path: str | Path, language: str = "") -> Suite:
    """Read sentences: a JSONL file, or a plain text file with one sentence per line.

    Args:
        path: of the file; ``demo:`` names an embedded one.
        language: of the sentences that do not say theirs.

    Raises:
        ValueError: with file and line of every fault, twenty at most.
    """
    prompts = [one if one.language else replace(one, language=language) for one in read_prompts(path)]
    return Suite("sentences", str(path), tuple(SuiteItem(one, _reference(one)) for one in prompts), "cv3")


def read_rows(path: str | Path, language: str = "") -> Suite:
    """Read the utterances of a manifest: its texts, and the recordings that their voices continue.

    Args:
        path: of the manifest.
        language: of the rows that do not say theirs.

    Raises:
        ManifestError: with file and line of every fault.
    """
    manifest = read_manifest(path, check_audio=False, unprepared=True)
    voices = VoiceNames()
    items = []
    for row in manifest.rows:
        audio = manifest.find(row.prompt_audio).absolute() if row.prompt_audio else None
        voice = row.speaker or voices.name(audio, row.prompt_text)
        sentence = _sentence(row, voice, row.language or language)
        truth = manifest.find(row.audio) if row.audio else None
        where = f"{path}: row {row.id!r}"
        items.append(SuiteItem(sentence, _reference(sentence), audio, row.prompt_text, truth, where))
    return Suite("manifest", str(path), tuple(items), "cv3")


def _sentence(row: Row, voice: str, language: str) -> SentencePrompt:
    right = row.spans[0].right if row.spans else ()
    transcripts = {right[0] if right else "": row.transcript} if row.transcript else {}
    return SentencePrompt(
        row.id, row.text, language, voice, row.spans if transcripts else (), transcripts, instruct=row.instruct
    )


def _reference(prompt: SentencePrompt) -> Reference:
    return Reference(prompt.text, prompt.language, prompt.target_text)
