# SPDX-License-Identifier: Apache-2.0
"""Scored folders for the tests of what reads them."""

import json
from pathlib import Path

import numpy as np

from tts_align.utils.audio import write_wav


def row(number, system="aligned", reading="right", cer=0.0, **more):
    """One utterance as ``utterances.jsonl`` has it; four utterances of each sentence."""
    known = {
        "id": f"s{number // 4}-v{number % 4}",
        "sentence": f"s{number // 4}",
        "text": "鍋は辛い",
        "speaker": f"v{number % 4}",
        "system": system,
        "seed": number,
        "speech": [1, 2, 3],
        "finished": True,
        "transcript": "なべわからい",
        "reading": reading,
        "cer": cer,
        "nearest_cer": 0.0,
        "audio": "",
        "error": "",
    }
    return known | more


def scored(folder, rows, **summary):
    """Write a scored folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(one, ensure_ascii=False) for one in rows)
    (folder / "utterances.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return folder


def sound(path, frequency=220.0, seconds=0.2):
    """A tone to hear."""
    return write_wav(
        Path(path), 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * 16_000)) / 16_000), 16_000
    )
