"""Recordings of two systems for listening tests: short, loud and quiet, with marked words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

WORDS = ("辛い", "今日", "明日", "市場", "人気", "一日")
READINGS = (("からい", "つらい"), ("きょう", "こんにち"), ("あした", "あす"), ("いちば", "しじょう"))
READINGS += (("にんき", "ひとけ"), ("いちにち", "ついたち"))


def sound(seed: int, seconds: float = 0.25, rate: int = 16000, level: float = 0.2) -> np.ndarray:
    """A hum of its own for every seed."""
    time = np.arange(int(seconds * rate)) / rate
    return level * np.sin(2 * np.pi * (150 + 37 * seed) * time) * np.sin(np.pi * time / seconds) ** 0.2


def sentences(folder: Path, count: int = 4) -> Path:
    """A file of sentences with a marked word each."""
    rows = [
        {
            "id": f"s{number}",
            "text": f"この{WORDS[number]}です",
            "language": "ja",
            "spans": [{"start": 2, "end": 4, "right": [READINGS[number][0]], "wrong": [READINGS[number][1]]}],
            "transcripts": {reading: f"この{reading}です" for reading in READINGS[number]},
        }
        for number in range(count)
    ]
    path = folder / "sentences.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def wavs(folder: Path, first_seed: int, count: int = 4, **how: Any) -> Path:
    """A folder of WAV files named after the sentences."""
    folder.mkdir(parents=True)
    for number in range(count):
        soundfile.write(folder / f"s{number}.wav", sound(first_seed + number, **how), how.get("rate", 16000))
    return folder


def scored(folder: Path, count: int = 4) -> Path:
    """A run as ``test`` leaves it: two systems, with sound, readings and speech tokens."""
    (folder / "test/audio").mkdir(parents=True)
    rows = []
    for number in range(count):
        for place, system in enumerate(("base", "aligned")):
            audio = f"audio/s{number}-{system}.wav"
            soundfile.write(folder / "test" / audio, sound(number + 20 * place, level=0.1 + 0.3 * place), 16000)
            reading = "wrong" if system == "base" else "right"
            row = {"id": f"s{number}", "sentence": f"s{number}", "text": f"この{WORDS[number]}です", "speaker": "anna"}
            row |= {"system": system, "seed": 1, "speech": [number, place, 7], "finished": True, "transcript": "x"}
            rows.append(row | {"reading": reading, "cer": 0.1, "nearest_cer": 0.1, "audio": audio, "error": ""})
    (folder / "test/utterances.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
    )
    recipe = f"model:\n  test:\n    prompts: {sentences(folder, count)}\n"
    (folder / "config.yaml").write_text(recipe, "utf-8")
    return folder


def answers(key: dict[str, Any], listener: str, choose: Any, repeats: int = 1) -> dict[str, Any]:
    """What the page saves of a listener who answers every question as told, the first questions of a kind twice.

    Args:
        key: the key as JSON.
        listener: name.
        choose: of the name of a question, the question, and whether it is asked again, the answer that the key's order
            of clips asks for.
        repeats: questions of each kind that come twice.
    """
    found = []
    for kind in key["kinds"]:
        mine = [name for name, trial in key["trials"].items() if trial["kind"] == kind and not trial.get("training")]
        for place, (name, again) in enumerate([(one, False) for one in mine] + [(one, True) for one in mine[:repeats]]):
            trial = key["trials"][name]
            clips = list(trial["clips"])
            value = choose(name, trial, again)
            if place % 2 and len(clips) == 2:
                clips.reverse()
                value = -value if kind == "cmos" else value
            one = {"trial": name, "kind": kind, "clips": clips, "answer": value, "milliseconds": 900}
            plays = {"AB"[number]: 1 for number in range(len(clips))}
            if kind == "abx":
                one["x"], plays["X"] = trial["clips"][0], 1
            found.append(one | {"plays": plays} | ({"repeat": True} if again else {}))
    return {
        "format": "tts-align listening answers",
        "version": 1,
        "test": key["test"],
        "listener": listener,
        "language": "ja",
        "about": {"headphones": "yes"},
        "complete": True,
        "answers": found,
    }


def attentive(key: dict[str, Any], otherwise: Any) -> Any:
    """Answers of somebody who hears what checks hold, and says something else to other questions."""

    def choose(name: str, trial: dict[str, Any], again: bool = False) -> Any:
        if any(key["clips"][clip].get("check") for clip in trial["clips"]):
            known = {"nmos": 1, "cmos": -3, "abx": trial["clips"][0]}
            return known.get(trial["kind"]) or trial["expected"][0]
        return otherwise(name, trial, again)

    return choose
