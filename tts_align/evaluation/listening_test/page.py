# SPDX-License-Identifier: Apache-2.0
"""The one HTML file of a listening test: opens from the disk, needs no server and no network."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import Any

from tts_align.evaluation.listening_test.design import Drawn, Plan
from tts_align.evaluation.listening_test.records import ANSWERS_FORMAT, Key, Trial
from tts_align.evaluation.listening_test.sound import flac_uri
from tts_align.utils.readers import parse_json

TEXTS = "texts.json"


def page(drawn: Drawn, plan: Plan) -> str:
    """The page as HTML; nothing in it tells systems, utterances or checks apart.

    Args:
        drawn: questions and clips.
        plan: how the page looks and in which order it asks.
    """
    key = drawn.key
    shown = {
        "id": key.test,
        "title": key.title,
        "language": plan.language,
        "design": key.design,
        "repeats": key.repeats,
        "answers_format": ANSWERS_FORMAT,
        "volume": _volume_clip(key),
        "sections": [_section(key, kind, plan) for kind in key.kinds],
        "clips": {name: flac_uri(one, key.sample_rate) for name, one in sorted(drawn.sounds.items())},
    }
    return Template(_part("page.html")).substitute(
        title=html.escape(key.title or "Listening test"),
        style=_part("page.css"),
        script=_part("page.js"),
        texts=_embedded(parse_json(_part(TEXTS), TEXTS)),
        test=_embedded(shown),
    )


def _part(name: str) -> str:
    return files("tts_align.evaluation.listening_test").joinpath(name).read_text("utf-8")


def _embedded(value: Any) -> str:
    """JSON inside a script element, which nothing in it can end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _volume_clip(key: Key) -> str:
    """A clip to set the volume by: ordinary speech."""
    return min(name for name, clip in key.clips.items() if not clip.check)


def _section(key: Key, kind: str, plan: Plan) -> dict[str, Any]:
    trials = {name: trial for name, trial in key.trials.items() if trial.kind == kind}
    return {
        "kind": kind,
        "training": [_shown(key, name, one, plan) for name, one in trials.items() if one.training],
        "trials": [_shown(key, name, one, plan) for name, one in trials.items() if not one.training],
    }


def _shown(key: Key, name: str, trial: Trial, plan: Plan) -> dict[str, Any]:
    """What a listener may know of a question."""
    found: dict[str, Any] = {"id": name, "kind": trial.kind, "clips": list(trial.clips), "group": trial.group}
    recording = key.clips[trial.clips[0]].recording
    if trial.kind == "reading":
        found["choices"] = list(trial.choices)
        if recording is None:
            return found | {"tones": True}
    assert recording is not None
    if recording.text and (plan.show_text or trial.kind == "reading"):
        found |= {"text": recording.text, "language": recording.language}
        if trial.kind == "reading":
            marked = next((one for one in _alternatives(key, recording.id) if one.spans), recording)
            found |= {"text": marked.text, "mark": [marked.spans[0].start, marked.spans[0].end]}
    return found


def _alternatives(key: Key, utterance: str) -> list[Any]:
    """The recordings of one utterance, of every system."""
    every = [clip.recording for clip in key.clips.values() if clip.recording is not None]
    return [one for one in every if one.id == utterance]
